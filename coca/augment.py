"""Random views of training pictures: a pure function of (seed, sample, pass), never of rank or time."""

import numpy as np
from PIL import Image

from coca.images import model_pixels
from coca.train_config import AugmentConfig


def random_view(
    image: Image.Image, size: int, config: AugmentConfig, *, seed: int, sample_id: str, lane_pass: int
) -> np.ndarray:
    """uint8 pixels (size, size, 3) of a random square crop, or of the centre crop where cropping is off.

    The crop keeps at least ``config.min_crop_area`` of the largest square and lies anywhere in the picture (Szegedy et
    al. 2015, without the change of aspect ratio, which captions about size and place would not survive).
    """
    if config.min_crop_area == 1:
        return model_pixels(image, size)
    random = _random(seed, sample_id, lane_pass)
    side = min(image.size) * np.sqrt(random.uniform(config.min_crop_area, 1))
    left, top = random.uniform(0, image.width - side), random.uniform(0, image.height - side)
    view = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return np.asarray(view)


def kept_patches(patches: int, keep: int, *, seed: int, sample_id: str, lane_pass: int) -> np.ndarray:
    """Indices of the patches a picture is seen by, ascending, int64: ``keep`` of ``patches``, each as likely."""
    # A stream of its own: what is cropped does not change what is dropped.
    chosen = _random(seed, sample_id, lane_pass, 1).permutation(patches)[:keep]
    return np.sort(chosen)


def _random(seed: int, sample_id: str, lane_pass: int, *stream: int) -> np.random.Generator:
    sequence = np.random.SeedSequence([seed, int(sample_id, 16), lane_pass, *stream])
    return np.random.Generator(np.random.Philox(sequence))
