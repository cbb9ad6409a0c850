from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from coca.errors import BadInput
from pipelines.column_presets import resolve_columns
from pipelines.links import read_links
from pipelines.links_config import LinksConfig


def read(path: Path, **settings: object) -> list[tuple[str, str, str | None]]:
    table = read_links(LinksConfig(uri=str(path), **settings))
    return [(row["url"], row["caption"], row["extra"]) for row in table.to_pylist()]


@pytest.mark.parametrize(
    ("preset", "columns", "extra"),
    [
        (
            "laion",  # LAION-400M
            {"SAMPLE_ID": 1, "URL": "u", "TEXT": "c", "HEIGHT": 2, "WIDTH": 3, "LICENSE": "?", "NSFW": "UNLIKELY"}
            | {"similarity": 0.5},
            '{"HEIGHT": 2, "LICENSE": "?", "NSFW": "UNLIKELY", "SAMPLE_ID": 1, "WIDTH": 3, "similarity": 0.5}',
        ),
        (
            "laion",  # LAION-2B-en-aesthetic
            {"URL": "u", "TEXT": "c", "WIDTH": 3, "HEIGHT": 2, "similarity": 0.5, "hash": 7, "punsafe": 0.0}
            | {"pwatermark": 0.25, "aesthetic": 8.0, "__index_level_0__": 4},
            '{"HEIGHT": 2, "WIDTH": 3, "aesthetic": 8.0, "hash": 7, "punsafe": 0.0, "pwatermark": 0.25, '
            '"similarity": 0.5}',
        ),
        (
            "datacomp",
            {"uid": "ab", "url": "u", "text": "c", "original_width": 3, "face_bboxes": [[0.1, 0.2, 0.3, 0.4]]},
            '{"face_bboxes": [[0.1, 0.2, 0.3, 0.4]], "original_width": 3, "uid": "ab"}',
        ),
        (
            "coyo",
            {"id": 841814333321, "url": "u", "text": "c", "image_phash": "c9b6a7d8469c1959", "watermark_score": 0.5},
            '{"id": 841814333321, "image_phash": "c9b6a7d8469c1959", "watermark_score": 0.5}',
        ),
    ],
)
def test_published_parquet_tables(tmp_path: Path, preset: str, columns: dict[str, object], extra: str) -> None:
    pq.write_table(pa.table({name: [value] for name, value in columns.items()}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", columns=preset) == [("u", "c", extra)]
    assert read(tmp_path / "a.parquet", columns=preset, extra_columns=()) == [("u", "c", None)]


def test_conceptual_captions_have_no_header_and_no_quotes(tmp_path: Path) -> None:
    (tmp_path / "cc3m.tsv").write_text('a "red" cat\thttp://a/1\n"two\thttp://a/2\n')
    (tmp_path / "cc12m.tsv").write_text("http://a/1\tone\n")
    (tmp_path / "headed.tsv").write_text("url\tcaption\nhttp://a/1\tone\n")
    cc3m = [("http://a/1", 'a "red" cat', None), ("http://a/2", '"two', None)]
    assert read(tmp_path / "cc3m.tsv", columns="cc3m") == cc3m
    assert read(tmp_path / "cc12m.tsv", columns="cc12m") == [("http://a/1", "one", None)]
    assert read(tmp_path / "headed.tsv", columns="cc12m") == [("http://a/1", "one", None)]  # as img2dataset advises
    with pytest.raises(BadInput, match="line 2 cannot be read: it has 1 fields, the header 2"):
        (tmp_path / "cc3m.tsv").write_text("a\thttp://a/1\nb\n")
        read(tmp_path / "cc3m.tsv", columns="cc3m")


def test_named_columns_override_the_preset(tmp_path: Path) -> None:
    pq.write_table(pa.table({"URL": ["u"], "ALT": ["c"], "mine": [1], "hash": [2]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", columns="laion", caption_column="ALT") == [("u", "c", '{"hash": 2}')]
    named = read(tmp_path / "a.parquet", columns="laion", caption_column="ALT", extra_columns=["mine"])
    assert named == [("u", "c", '{"mine": 1}')]


def test_without_a_preset() -> None:
    assert resolve_columns(LinksConfig()).texts == ("url", "caption")
    assert resolve_columns(LinksConfig(url_column="a", caption_column="b")).texts == ("a", "b")
    assert resolve_columns(LinksConfig()).extra_of(["url", "caption", "x"], "a.csv") == ()
    assert resolve_columns(LinksConfig(extra_columns=("x", "*"))).extra_of(["url", "caption", "x", "y"], "") == (
        "x",
        "y",
    )
