"""Pictures changed before they are stored: a function of the user's, such as one that blurs faces."""

from functools import cache
from typing import Protocol

import numpy as np
from PIL import Image

from coca.errors import RunFailed
from pipelines.factories import load_factory


class ImageTransform(Protocol):
    """Changes a picture before it is stored, such as by blurring faces."""

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """uint8 of shape (H, W, 3), RGB, to the same."""
        ...


def transform_image(factory: str, image: Image.Image) -> Image.Image:
    """A picture in mode RGB, changed by the transform that ``module:function`` makes.

    Raises:
        BadInput: no such function.
        RunFailed: what comes back is no uint8 picture of shape (H, W, 3).
    """
    changed = np.asarray(_make(factory)(np.asarray(image)))
    if changed.dtype != np.uint8 or changed.ndim != 3 or changed.shape[2] != 3 or 0 in changed.shape:
        raise RunFailed(f"image.transform {factory} gave {changed.dtype} of shape {changed.shape}, not uint8 (H, W, 3)")
    return Image.fromarray(changed)


@cache
def _make(factory: str) -> ImageTransform:
    return load_factory(factory)()
