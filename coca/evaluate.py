"""The numbers a checkpoint is judged by: captions, retrieval, zero-shot classification, perplexity.

Shapes: N pictures, M texts, B batch, C channels, H height, W width, T tokens, E embedding, K classes, P prompts.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from coca.config import Preprocessing
from coca.errors import BadInput
from coca.feed import normalize, pad_tokens
from coca.generate import generate
from coca.images import ImageLimits, ImageProblem, decode_rgb, model_pixels
from coca.likelihood import caption_log_likelihood
from coca.model import CoCa
from coca.retrieval import recall_at_k
from coca.storage import open_file
from coca.tokenizer import Tokenizer

BATCH = 64
ClassifyBy = Literal["embedding", "likelihood"]


class Captioner(Protocol):
    """What is evaluated: a `coca.checkpoint.Checkpoint`, or a model in training with what its inputs need."""

    @property
    def model(self) -> CoCa: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def preprocessing(self) -> Preprocessing: ...


@dataclass
class EvaluationSet:
    """Pictures with their accepted captions and, where they are to be classified, labels."""

    images: list[bytes]
    captions: list[list[str]]
    labels: list[str] | None


def read_evaluation_set(uri: str, option: str = "--data") -> EvaluationSet:
    """A Parquet file with `image` (encoded bytes), `captions` (list of strings) and, optionally, `label`.

    Args:
        option: what gave the uri, for the messages.

    Raises:
        BadInput: no such file, not Parquet, a column missing, no rows, or a picture without captions.
    """
    store, name = open_file(uri)
    try:
        with store.filesystem.open_input_file(store.path(name)) as source:
            table = pq.read_table(source)
    except FileNotFoundError:
        raise BadInput(f"there is no evaluation set {uri}", f"Give {option} a Parquet file") from None
    except pa.ArrowInvalid as error:
        raise BadInput(f"{uri} is not Parquet: {error}", f"Give {option} a Parquet file") from None
    except OSError as error:  # a folder, say
        raise BadInput(f"cannot read the evaluation set {uri}: {error}", f"Give {option} a Parquet file") from None
    for column in ("image", "captions"):
        if column not in table.column_names:
            raise BadInput(
                f"{uri} has no column {column!r}, only {', '.join(table.column_names)}",
                "An evaluation set has `image` (bytes) and `captions` (list of strings)",
            )
    if table.num_rows == 0:
        raise BadInput(f"{uri} has no rows", f"Give {option} a set with pictures")
    labels = _column(table, "label", pa.string(), uri) if "label" in table.column_names else None
    images, captions = _column(table, "image", pa.binary(), uri), _column(table, "captions", pa.list_(pa.string()), uri)
    empty = next((index for index, texts in enumerate(captions) if not texts or None in texts), None)
    if empty is not None:
        raise BadInput(f"{uri}: row {empty} has no captions", "Give every picture at least one, and none that is null")
    return EvaluationSet(images, captions, labels)


def _column(table: pa.Table, name: str, kind: pa.DataType, uri: str) -> list[Any]:
    column = table[name]
    if column.null_count:
        raise BadInput(f"{uri}: column {name!r} has {column.null_count} nulls", "Remove those rows")
    try:
        return list(column.cast(kind).to_pylist())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise BadInput(f"{uri}: column {name!r} holds {column.type}, not {kind}", "Write it in that type") from None


def evaluate_captions(captioner: Captioner, data: EvaluationSet) -> dict[str, Any]:
    """Greedy captions: `exact_caption`, the share that equals one of the accepted captions, and the captions."""
    written = write_captions(captioner, data.images)
    exact = [text in [_plain(c) for c in accepted] for text, accepted in zip(written, data.captions, strict=True)]
    return {
        "pictures": len(exact),
        "exact_caption": sum(exact) / len(exact),
        "captions": written,
        "exact": exact,
    }


def evaluate_retrieval(captioner: Captioner, data: EvaluationSet) -> dict[str, Any]:
    """Recall at 1, 5 and 10 both ways over the set as one pool; every accepted caption of a picture is a text."""
    image_features_NE = embed_images(captioner, data.images)
    texts = [caption for accepted in data.captions for caption in accepted]
    owner = [index for index, accepted in enumerate(data.captions) for _ in accepted]
    similarity_NM = image_features_NE @ embed_texts(captioner, texts).T
    recalls = recall_at_k(similarity_NM, torch.tensor(owner))
    chance = {
        "chance_image_to_text_at_1": _mean_share(data.captions),
        "chance_text_to_image_at_1": 1 / len(data.images),
    }
    return {"pictures": len(data.images), "texts": len(texts), **recalls, **chance}


def evaluate_classification(
    captioner: Captioner,
    data: EvaluationSet,
    classes: Sequence[str],
    templates: Sequence[str],
    by: ClassifyBy = "embedding",
) -> dict[str, Any]:
    """Zero-shot accuracy: the share of pictures whose likeliest class is their label.

    Args:
        templates: prompts with ``{}`` where the class name goes.
        by: ``embedding``, nearest to the normalised mean of a class's normalised prompt embeddings (Radford et al.
            2021); ``likelihood``, the largest mean over a class's prompts of their log-likelihood as a caption
            (Tschannen et al. 2023).
    """
    if data.labels is None:
        raise BadInput("the evaluation set has no column 'label'", "Add the class name of every picture")
    unknown = sorted(set(data.labels) - set(classes))
    if unknown:
        raise BadInput(f"label {unknown[0]!r} is not among the classes", f"Known are {', '.join(classes)}")
    bad = next((template for template in templates if "{}" not in template), None)
    if bad is not None or not templates:
        raise BadInput(f"template {bad!r} has no {{}}", "Write {} where the class name goes")
    prompts = [template.replace("{}", name) for name in classes for template in templates]
    scores = _similarities if by == "embedding" else _likelihoods
    predicted_N = scores(captioner, data.images, prompts, len(classes)).argmax(dim=1)
    truth_N = torch.tensor([list(classes).index(label) for label in data.labels])
    accuracy = (predicted_N == truth_N).float().mean().item()
    return {"pictures": len(data.images), "by": by, "zero_shot_accuracy": accuracy, "chance": 1 / len(classes)}


def _similarities(captioner: Captioner, images: Sequence[bytes], prompts: Sequence[str], classes: int) -> Tensor:
    """(N, K) of every picture with every class, whose prompts stand side by side."""
    prompts_KTE = embed_texts(captioner, prompts).unflatten(0, (classes, -1))
    return embed_images(captioner, images) @ F.normalize(prompts_KTE.mean(dim=1), dim=-1).T


def _likelihoods(captioner: Captioner, images: Sequence[bytes], prompts: Sequence[str], classes: int) -> Tensor:
    """(N, K) of every picture with every class, whose prompts stand side by side."""
    tokens_PT = tokenize(captioner, prompts)
    parts = [
        caption_log_likelihood(captioner.model, images_BCHW, tokens_PT, step=8)
        for _, images_BCHW in image_batches(captioner, images)
    ]
    return torch.cat(parts).unflatten(1, (classes, -1)).mean(dim=2)


def perplexity(captioner: Captioner, data: EvaluationSet) -> float:
    """exp of ``caption_loss``."""
    return math.exp(caption_loss(captioner, data))


def caption_loss(captioner: Captioner, data: EvaluationSet) -> float:
    """Mean negative log-likelihood of a token, over each picture's first accepted caption."""
    total, tokens = 0.0, 0
    with torch.inference_mode():
        for start, images_BCHW in image_batches(captioner, data.images):
            tokens_BT = tokenize(captioner, [c[0] for c in data.captions[start : start + len(images_BCHW)]])
            logits_BTV = captioner.model(images_BCHW, tokens_BT).logits
            loss, count = token_losses(logits_BTV, tokens_BT, captioner.tokenizer.pad_id)
            total, tokens = total + loss, tokens + count
    return total / tokens


def token_losses(logits_BTV: Tensor, tokens_BT: Tensor, pad_id: int) -> tuple[float, int]:
    """(sum of the negative log-likelihoods of all tokens that are no padding, how many they are), on this rank alone.

    Args:
        logits_BTV: position t predicts token t + 1; T - 1 positions.
    """
    target_P = tokens_BT[:, 1:].flatten()
    logits_PV = logits_BTV.flatten(0, 1).float()
    loss = F.cross_entropy(logits_PV, target_P, ignore_index=pad_id, reduction="sum")
    return loss.item(), int((target_P != pad_id).sum())


def write_captions(captioner: Captioner, images: Sequence[bytes]) -> list[str]:
    tokenizer = captioner.tokenizer
    written = []
    for _, images_BCHW in image_batches(captioner, images):
        tokens_BT = generate(captioner.model, images_BCHW).tokens_BT
        written += [_plain(tokenizer.decode(row)) for row in tokens_BT.tolist()]
    return written


def embed_images(captioner: Captioner, images: Sequence[bytes]) -> Tensor:
    """Encoded pictures to (N, E) at unit length."""
    with torch.inference_mode():
        parts = [captioner.model.encode_image(batch)[0] for _, batch in image_batches(captioner, images)]
    return torch.cat(parts)


def embed_texts(captioner: Captioner, texts: Sequence[str]) -> Tensor:
    """Captions to (M, E) at unit length."""
    with torch.inference_mode():
        parts = [
            captioner.model.encode_text(tokenize(captioner, texts[start : start + BATCH]))
            for start in range(0, len(texts), BATCH)
        ]
    return torch.cat(parts)


def image_batches(captioner: Captioner, images: Sequence[bytes]) -> Iterator[tuple[int, Tensor]]:
    """Encoded pictures as normalised pixels (B, C, H, W) on the model's device, each batch with its first index."""
    size = captioner.preprocessing.image_size
    device = next(captioner.model.parameters()).device
    for start in range(0, len(images), BATCH):
        pixels = [_pixels(data, size, start + i) for i, data in enumerate(images[start : start + BATCH])]
        pixels_BHWC = torch.from_numpy(np.stack(pixels)).to(device)
        yield start, normalize(pixels_BHWC, captioner.preprocessing)


def _pixels(data: bytes, size: int, index: int) -> np.ndarray:
    try:
        return model_pixels(decode_rgb(data, ImageLimits()), size)
    except ImageProblem as problem:
        raise BadInput(f"picture {index} of the evaluation set: {problem}", "Remove or mend it") from None


def tokenize(captioner: Captioner, texts: Sequence[str]) -> Tensor:
    """Captions to token ids (B, T), padded to the longest, on the model's device."""
    tokenizer = captioner.tokenizer
    length = captioner.model.config.text.context_length
    tokens_BT = pad_tokens(tokenizer.encode(texts), length, tokenizer.pad_id, tokenizer.end_id)
    return tokens_BT.to(next(captioner.model.parameters()).device)


def _plain(caption: str) -> str:
    return " ".join(caption.lower().split())


def _mean_share(captions: list[list[str]]) -> float:
    total = sum(len(accepted) for accepted in captions)
    return sum(len(accepted) / total for accepted in captions) / len(captions)
