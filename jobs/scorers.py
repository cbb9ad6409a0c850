"""Scorers by name: a CoCa checkpoint, or any factory given as ``module:function``."""

import re
from typing import Any

import numpy as np

from coca.errors import BadInput
from pipelines.factories import load_factory
from pipelines.scorer import ScorerSpec

SIMILARITY = "coca_similarity"

_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def scorer_spec(text: str, *, actors: int = 1, gpus: float = 0.0) -> ScorerSpec:
    """The scorer that a word of the command line names.

    Args:
        text: a checkpoint or run folder, whose score is ``coca_similarity``; or ``module:function``, a function
            without arguments that gives a ``pipelines.scorer.Scorer``.
        gpus: for each actor.

    Raises:
        BadInput: neither of them.
    """
    if _FACTORY.fullmatch(text):
        return ScorerSpec(load_factory(text), source=text, actors=actors, num_gpus=gpus)
    from coca.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(text)
    _ = checkpoint.tokenizer  # one without cannot read captions
    return ScorerSpec(
        CheckpointScorer,
        source=f"{checkpoint.uri}@{checkpoint.digest}",
        arguments={"uri": checkpoint.uri, "digest": checkpoint.digest, "device": "cuda" if gpus else "cpu"},
        actors=actors,
        num_gpus=gpus,
    )


class CheckpointScorer:
    """``coca_similarity``: the cosine of a checkpoint's embeddings of picture and caption, -1 to 1."""

    def __init__(self, uri: str, digest: str, device: str = "cpu") -> None:
        """
        Raises:
            BadInput: the checkpoint there is another one than ``digest`` names.
        """
        from coca.checkpoint import load_checkpoint

        self._checkpoint = load_checkpoint(uri)
        if self._checkpoint.digest != digest:
            raise BadInput(f"{uri} has changed since this run began", "Leave a checkpoint alone while it scores")
        self._checkpoint.model.to(device)
        self._device = device

    def score(self, images: list[np.ndarray], captions: list[str]) -> dict[str, np.ndarray]:
        import torch

        from coca.evaluate import embed_texts

        with torch.inference_mode():
            image_BE = self._checkpoint.model.encode_image(self._pixels(images))[0]
            text_BE = embed_texts(self._checkpoint, captions)
            return {SIMILARITY: (image_BE * text_BE).sum(dim=1).float().cpu().numpy()}

    def _pixels(self, images: list[np.ndarray]) -> Any:
        """The model's input, (B, C, H, W), as in training and evaluation."""
        import torch
        from PIL import Image

        from coca.feed import normalize
        from coca.images import model_pixels

        preprocessing = self._checkpoint.preprocessing
        pixels = [model_pixels(Image.fromarray(image), preprocessing.image_size) for image in images]
        return normalize(torch.from_numpy(np.stack(pixels)).to(self._device), preprocessing)
