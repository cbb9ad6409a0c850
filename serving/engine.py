"""The model as a service sees it: bytes and strings in, captions and embeddings out. Torch, no Ray.

Shapes: B batch, C channels, H height, W width, T tokens, E embedding.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from coca.checkpoint import Checkpoint, load_checkpoint
from coca.errors import RunFailed
from coca.feed import normalize, pad_tokens
from coca.generate import generate
from coca.images import ImageLimits, ImageProblem, decode_rgb, model_pixels
from coca.packed import packed
from serving.results import Caption, Embedding, ModelInfo, Refusal

Input = TypeVar("Input")
Prepared = TypeVar("Prepared")
Result = TypeVar("Result")


class Engine:
    """One loaded checkpoint. Inputs may be prepared (`pixels`, `tokens`) in many threads; compute in one.

    Raises:
        BadInput: the checkpoint is missing or broken.
    """

    def __init__(
        self,
        checkpoint: str,
        *,
        device: str = "cpu",
        limits: ImageLimits | None = None,
        max_caption_tokens: int | None = None,
    ) -> None:
        loaded = load_checkpoint(checkpoint)
        self._device = torch.device(device)
        self._model = loaded.model.to(self._device)
        # The weights stay as they are from here on, so on a CPU their packed copies can stay as well.
        self._packed = ExitStack()
        self._packed.enter_context(packed(self._model))
        self._tokenizer = loaded.tokenizer
        self._preprocessing = loaded.preprocessing
        self._limits = limits or ImageLimits()
        self._max_caption_tokens = max_caption_tokens
        self.info = model_info(loaded)

    def caption(self, images: Sequence[bytes]) -> list[Caption | Refusal]:
        """A caption, or the reason there is none, for each encoded image in order."""
        return _answer(images, self.pixels, self.caption_pixels)

    def embed_images(self, images: Sequence[bytes]) -> list[Embedding | Refusal]:
        """An embedding, or the reason there is none, for each encoded image in order."""
        return _answer(images, self.pixels, self.embed_pixels)

    def embed_texts(self, texts: Sequence[str]) -> list[Embedding | Refusal]:
        """An embedding, or the reason there is none, for each text in order."""
        return _answer(texts, self.tokens, self.embed_tokens)

    def pixels(self, data: bytes) -> np.ndarray | Refusal:
        """Encoded bytes to what the model sees, uint8 (H, W, C)."""
        size = self._preprocessing.image_size
        try:
            return model_pixels(decode_rgb(data, self._limits), size)
        except ImageProblem as problem:
            return Refusal(problem.reason.value, problem.detail)

    def tokens(self, text: str) -> list[int] | Refusal:
        """Token ids, begin and end included."""
        if not text.strip():
            return Refusal("empty_text", "the text is empty")
        ids = self._tokenizer.encode([text])[0]
        longest = self.info.context_length
        if len(ids) > longest:
            return Refusal("text_too_long", f"{len(ids)} tokens, begin and end included, at most {longest}")
        return ids

    @torch.inference_mode()
    def caption_pixels(self, pixels: Sequence[np.ndarray]) -> list[Caption]:
        """Captions of images from `pixels`, in one pass."""
        tokenizer = self._tokenizer
        generation = generate(
            self._model,
            self._images(pixels),
            max_length=self._max_caption_tokens,
        )
        rows = generation.tokens_BT.tolist()
        return [Caption(tokenizer.decode(row), tokenizer.end_id in row, len(rows)) for row in rows]

    @torch.inference_mode()
    def embed_pixels(self, pixels: Sequence[np.ndarray]) -> list[Embedding]:
        """Embeddings of images from `pixels`, in one pass."""
        features_BE, _ = self._model.encode_image(self._images(pixels))
        return [Embedding(vector, 0, len(pixels)) for vector in features_BE.float().cpu().numpy()]

    @torch.inference_mode()
    def embed_tokens(self, tokens: Sequence[list[int]]) -> list[Embedding]:
        """Embeddings of texts from `tokens`, in one pass."""
        rows = list(tokens)
        tokens_BT = pad_tokens(rows, self.info.context_length, self._tokenizer.pad_id, self._tokenizer.end_id)
        features_BE = self._model.encode_text(tokens_BT.to(self._device)).float().cpu().numpy()
        return [Embedding(vector, len(row), len(rows)) for vector, row in zip(features_BE, rows, strict=True)]

    def check(self) -> None:
        """Embed one grey image.

        Raises:
            RunFailed: the answer is no unit vector, as after weights or a device went bad.
        """
        size = self.info.image_size
        grey = np.full((size, size, 3), 128, dtype=np.uint8)
        length = float(np.linalg.norm(self.embed_pixels([grey])[0].vector))
        if not abs(length - 1) < 1e-3:
            raise RunFailed(f"the embedding of a grey image has length {length}, not 1")

    def _images(self, pixels: Sequence[np.ndarray]) -> Tensor:
        pixels_BHWC = torch.from_numpy(np.stack(pixels)).to(self._device)
        return normalize(pixels_BHWC, self._preprocessing)


def model_info(checkpoint: Checkpoint) -> ModelInfo:
    """What a service tells about its checkpoint."""
    return ModelInfo(
        step=checkpoint.step,
        digest=checkpoint.digest,
        embedding_dim=checkpoint.config.embedding_width,
        image_size=checkpoint.preprocessing.image_size,
        context_length=checkpoint.config.text.context_length,
    )


def _answer(
    inputs: Sequence[Input],
    prepare: Callable[[Input], Prepared | Refusal],
    compute: Callable[[Sequence[Prepared]], list[Result]],
) -> list[Result | Refusal]:
    """Results of the inputs that can be prepared, in place; refusals of the others."""
    prepared = [prepare(item) for item in inputs]
    sound = [item for item in prepared if not isinstance(item, Refusal)]
    results = iter(compute(sound) if sound else [])
    return [item if isinstance(item, Refusal) else next(results) for item in prepared]
