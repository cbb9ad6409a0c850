"""Random views of training pictures: a pure function of (seed, sample, pass), never of rank or time.

Shapes: H x W pixels of a picture or of its view, C = 3 channels.
"""

import math
import warnings

import numpy as np
from PIL import Image

from coca.images import model_pixels
from coca.train_config import AugmentConfig

warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing writes into it


def random_view(
    image_HWC: np.ndarray, pixels_HWC: np.ndarray, config: AugmentConfig, *, seed: int, sample_id: str, lane_pass: int
) -> None:
    """Write a random square crop of a picture into ``pixels_HWC``, both uint8; the centre crop where cropping is off.

    The crop keeps ``config.min_crop_area`` of the largest square or more and lies anywhere in the picture (Szegedy et
    al. 2015, without the change of aspect ratio, which captions about size and place would not survive).
    """
    if config.min_crop_area == 1:
        pixels_HWC[:] = model_pixels(Image.fromarray(image_HWC), len(pixels_HWC))
        return
    random = _random(seed, sample_id, lane_pass)
    height, width = image_HWC.shape[:2]
    side = math.ceil(min(width, height) * random.uniform(config.min_crop_area, 1) ** 0.5)
    left, top = (int(random.uniform(0, length - side + 1)) for length in (width, height))
    _resize(image_HWC[top : top + side, left : left + side], pixels_HWC)


def _resize(image_HWC: np.ndarray, pixels_HWC: np.ndarray) -> None:
    """Pillow's bicubic filter as torch has it, with vector instructions: a third of the time, and one value in 500 by
    one or two levels apart. The operation itself, since what ``interpolate`` returns would have to be copied."""
    import torch  # here: where nothing is cropped, a process that decodes needs none

    # Made contiguous by numpy: torch would start its own threads for that, in each of the processes.
    arrays = np.ascontiguousarray(image_HWC), pixels_HWC
    source_1CHW, target_1CHW = (torch.from_numpy(array).permute(2, 0, 1)[None] for array in arrays)
    size = list(target_1CHW.shape[2:])
    torch.ops.aten._upsample_bicubic2d_aa.out(source_1CHW, size, False, None, None, out=target_1CHW)


def kept_patches(patches: int, keep: int, *, seed: int, sample_id: str, lane_pass: int) -> np.ndarray:
    """Indices of the patches a picture is seen by, ascending, int64: ``keep`` of ``patches``, each as likely."""
    # A stream of its own: what is cropped does not change what is dropped.
    chosen = _random(seed, sample_id, lane_pass, 1).permutation(patches)[:keep]
    return np.sort(chosen)


def _random(seed: int, sample_id: str, lane_pass: int, *stream: int) -> np.random.Generator:
    sequence = np.random.SeedSequence([seed, int(sample_id, 16), lane_pass, *stream])
    return np.random.Generator(np.random.Philox(sequence))
