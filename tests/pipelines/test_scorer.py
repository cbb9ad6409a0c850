"""Scorers: pictures in, numbers out, and a gap where there is no picture or no number."""

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from coca.errors import BadInput, RunFailed
from coca.storage import Store
from coca.tokenizer import Tokenizer
from pipelines.scorer import ScoreFiles, ScorerSpec, _check_cpus, scores_path
from tests.stored_dataset import publish, row


class Shape:
    """Remembers what it was shown."""

    seen: list[int] = []  # noqa: RUF012  (shared by the instances of one test)

    def score(self, images: list[np.ndarray], captions: list[str]) -> dict[str, np.ndarray]:
        self.seen.append(len(images))
        assert all(image.dtype == np.uint8 and image.shape[2] == 3 for image in images)
        values = [
            float("nan") if caption == "no number" else image.shape[1]
            for image, caption in zip(images, captions, strict=True)
        ]
        return {"width": np.array(values)}


def png(width: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, 40), "red").save(buffer, "PNG")
    return buffer.getvalue()


def score(tmp_path: Path, tokenizer: Tokenizer, rows: list[dict[str, object]], **options: int) -> dict[str, object]:
    publish(tmp_path, tokenizer, rows, config={})
    spec = ScorerSpec(Shape, source="test", **options)
    store = Store(tmp_path)
    ScoreFiles(store, spec, "staging/scores").score_file("first-p00000.parquet")
    with (tmp_path / scores_path("staging/scores", "first-p00000.parquet")).open("rb") as file:
        found = pq.read_table(file)
    captions = {each["sample_id"]: each["caption"] for each in rows}
    stored = pq.read_table(tmp_path / "samples/first-p00000.parquet", columns=["sample_id"])
    assert found["sample_id"].equals(stored["sample_id"])
    return {str(captions[each["sample_id"]]): each["scores"] for each in found.to_pylist()}


def test_scores_of_a_file_with_gaps(tmp_path: Path, tokenizer: Tokenizer) -> None:
    Shape.seen.clear()
    purged = row("p", "purged", png(33))
    purged["image"] = bytes(len(png(33)))
    rows = [row(f"n{n}", f"number {n}", png(32 + n)) for n in range(5)] + [row("x", "no number", png(32)), purged]
    found = score(tmp_path, tokenizer, rows, batch_size=3)
    assert found == {
        **{f"number {n}": [("width", 32.0 + n)] for n in range(5)},
        "no number": None,
        "purged": None,
    }
    assert sum(Shape.seen) == 6
    assert max(Shape.seen) <= 3


def test_a_wrong_number_of_scores_ends_the_run(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Shape, "score", lambda self, images, captions: {"width": np.zeros(1)})
    with pytest.raises(RunFailed, match=r"test gave 'width' of shape \(1,\) for 2 pictures"):
        score(tmp_path, tokenizer, [row("a", "one"), row("b", "two")])


def test_one_cpu_is_left_to_read_with() -> None:
    spec = ScorerSpec(Shape, source="test", num_cpus=2)
    _check_cpus(5, 2, spec)
    with pytest.raises(BadInput, match=r"3 scorers with 2 CPUs each leave none .* has 6. Take 2 or fewer"):
        _check_cpus(6, 3, spec)
    with pytest.raises(BadInput, match="Give Ray 2 CPUs or more"):
        _check_cpus(1, 1, spec)
