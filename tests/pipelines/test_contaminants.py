"""Hash lists of evaluation pictures."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from coca.errors import BadInput
from coca.images import phash
from pipelines.contaminants import read_contaminants

SHA = "ab" * 32


def test_lists_of_both_kinds_of_hash(tmp_path: Path) -> None:
    from PIL import Image

    blank = phash(Image.new("L", (32, 32), 255)) % 2**64
    (tmp_path / "a.txt").write_text(f"# from the evaluation set\n\n{SHA.upper()}\n  5a5a5a5a0f0f0f0f  # one\n")
    (tmp_path / "b.txt").write_text(f"{blank:016x}\n")
    lists = read_contaminants([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")], max_hamming=2)
    assert lists is not None
    assert lists.phashes.tolist() == [0x5A5A5A5A0F0F0F0F]  # a blank picture keeps nobody out
    hashes = np.array([1, 0x5A5A5A5A0F0F0F0C, 0x5A5A5A5A0F0F0F00, blank], dtype=np.uint64).view(np.int64)
    found = lists.mask(pa.chunked_array([[SHA, "x", "y", "z"]]), pa.chunked_array([hashes]))
    assert found.tolist() == [True, True, False, False]


def test_no_list_is_none() -> None:
    assert read_contaminants([], 4) is None


@pytest.mark.parametrize(
    ("text", "problem"), [("\n# only words\n", "holds no hash"), (f"{SHA}\nabc\n", "line 2: 'abc' is no hash")]
)
def test_bad_lists_are_refused(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(BadInput, match=problem):
        read_contaminants([str(tmp_path / "a.txt")], 4)
    with pytest.raises(BadInput, match="cannot read the hash list"):
        read_contaminants([str(tmp_path / "none.txt")], 4)
