"""A held-out set that training is judged by on the way: retrieval both ways, caption loss, and captions to look at.

Measures go into the row of metrics.jsonl of their step, as ``held_out_<measure>``. Captions lie in
``evaluations/step_<n>.json`` of the run folder, thumbnails of their pictures once in ``evaluations/pictures/``.

Shapes: N pictures, M texts, B batch, C channels, H height, W width, T tokens, E embedding.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from coca.config import Preprocessing
from coca.evaluate import (
    EvaluationSet,
    embed_texts,
    image_batches,
    read_evaluation_set,
    token_losses,
    tokenize,
    write_captions,
)
from coca.images import ImageLimits, decode, encode, resize
from coca.model import CoCa
from coca.retrieval import recall_at_k
from coca.storage import Store
from coca.tokenizer import Tokenizer

FOLDER = "evaluations"
PREFIX = "held_out_"
_CAPTIONED = 16
_THUMBNAIL = 160


class Written(NamedTuple):
    """What the model wrote under one picture."""

    picture: int
    """Its place in the set."""
    caption: str
    accepted: list[str]


@dataclass(frozen=True)
class _InTraining:
    """A `coca.evaluate.Captioner`."""

    model: CoCa
    tokenizer: Tokenizer
    preprocessing: Preprocessing


class HeldOut:
    """The first pictures of an evaluation set, in memory; rank 0 alone needs one."""

    def __init__(self, uri: str, pictures: int) -> None:
        """
        Raises:
            BadInput: as `coca.evaluate.read_evaluation_set`.
        """
        data = read_evaluation_set(uri, "held_out")
        self._data = EvaluationSet(data.images[:pictures], data.captions[:pictures], None)

    @property
    def pictures(self) -> int:
        return len(self._data.images)

    def evaluate(
        self, model: CoCa, tokenizer: Tokenizer, preprocessing: Preprocessing
    ) -> tuple[dict[str, float], list[Written]]:
        """Judge a model as it stands; it is left as it was, and so is torch's random state. Speaks to no other rank.

        Returns:
            ``image_to_text_recall_at_<1, 5>``, ``text_to_image_recall_at_<1, 5>`` over all accepted captions, and
            ``caption_loss`` (mean negative log-likelihood of a token, over each picture's first accepted caption);
            greedy captions of the first 16 pictures.
        """
        captioner = _InTraining(model, tokenizer, preprocessing)
        with _judged(model), torch.no_grad():
            measures = self._measure(captioner)
            captions = write_captions(captioner, self._data.images[:_CAPTIONED])
        written = [Written(n, caption, self._data.captions[n]) for n, caption in enumerate(captions)]
        return measures, written

    def _measure(self, captioner: _InTraining) -> dict[str, float]:
        images, captions = self._data.images, self._data.captions
        parts, total, tokens = [], 0.0, 0
        for start, images_BCHW in image_batches(captioner, images):
            tokens_BT = tokenize(captioner, [c[0] for c in captions[start : start + len(images_BCHW)]])
            output = captioner.model(images_BCHW, tokens_BT)
            loss, count = token_losses(output.logits, tokens_BT, captioner.tokenizer.pad_id)
            total, tokens = total + loss, tokens + count
            parts.append(output.image_features.float().cpu())
        texts = [caption for accepted in captions for caption in accepted]
        owner_M = torch.tensor([index for index, accepted in enumerate(captions) for _ in accepted])
        similarity_NM = torch.cat(parts) @ embed_texts(captioner, texts).float().cpu().T
        return {**recall_at_k(similarity_NM, owner_M, ks=(1, 5)), "caption_loss": total / tokens}

    def save(self, store: Store, step: int, measures: dict[str, float], captions: list[Written]) -> None:
        """Write an evaluation into a run folder; one of the same step is replaced."""
        there = set(store.list(f"{FOLDER}/pictures"))
        for written in captions:
            name = picture_name(written.picture)
            if name not in there:
                store.write(f"{FOLDER}/pictures/{name}", _thumbnail(self._data.images[written.picture]))
        values = {"step": step, "measures": measures, "captions": [written._asdict() for written in captions]}
        store.write(f"{FOLDER}/step_{step:09d}.json", json.dumps(values, indent=1).encode())


def read_evaluations(store: Store) -> list[dict[str, Any]]:
    """What ``HeldOut.save`` wrote into a run folder, by step: ``step``, ``measures``, ``captions``."""
    names = [name for name in store.list(FOLDER) if name.startswith("step_") and name.endswith(".json")]
    return sorted((json.loads(store.read(f"{FOLDER}/{name}")) for name in names), key=lambda values: values["step"])


def picture_name(picture: int) -> str:
    """The thumbnail's file in ``evaluations/pictures``."""
    return f"{picture:05d}.jpg"


@contextmanager
def _judged(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _thumbnail(data: bytes) -> bytes:
    image = decode(data, ImageLimits(), short_side=_THUMBNAIL).image
    return encode(resize(image, "keep_ratio_largest", _THUMBNAIL), "jpeg", 85)
