"""Pictures changed before they are stored."""

import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from coca.dataset import Dataset
from coca.errors import BadInput, RunFailed
from pipelines.config import RefreshConfig
from pipelines.image_transform import transform_image
from pipelines.refresh import refresh

MODULE = """
import numpy as np

def blacken():
    return lambda image: np.zeros_like(image)

def grey():
    return lambda image: image[..., 0]

def half():
    return lambda image: image / 2

def nothing():
    return lambda image: image[:0]
"""


@pytest.fixture
def transforms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "their_transforms.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # for the decoding processes
    yield "their_transforms"
    sys.modules.pop("their_transforms", None)
    transform_image.__globals__["_make"].cache_clear()


def test_a_transform_gives_a_picture_or_ends_the_run(transforms: str) -> None:
    picture = Image.new("RGB", (5, 4), "red")
    assert np.asarray(transform_image(f"{transforms}:blacken", picture)).max() == 0
    for bad in ("grey", "half", "nothing"):
        with pytest.raises(RunFailed, match=rf"image.transform their_transforms:{bad} gave .* not uint8"):
            transform_image(f"{transforms}:{bad}", picture)


def test_what_is_stored_has_gone_through_it(
    web: Any, pages: Any, refresh_config: Callable[..., RefreshConfig], without_ray: None, transforms: str
) -> None:
    web.pages["/a"] = pages.image("a")
    config = refresh_config([("/a", "a picture")], image={"transform": f"{transforms}:blacken"})
    assert refresh(config).samples == 1
    stored = Dataset(config.to).read_row_group(0)["image"][0].as_py()
    assert np.asarray(Image.open(io.BytesIO(stored))).max() <= 2


def test_a_broken_one_is_told_before_any_request(
    web: Any, pages: Any, refresh_config: Callable[..., RefreshConfig], without_ray: None, transforms: str
) -> None:
    for name, error in ((f"{transforms}:grey", RunFailed), (f"{transforms}:none", BadInput)):
        config = refresh_config([("/a", "a picture")], image={"transform": name})
        with pytest.raises(error):
            refresh(config)
    assert not web.requests
    assert not Path(config.to).exists()
