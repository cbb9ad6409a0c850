"""Reading tables of links as strangers wrote them."""

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from coca.errors import BadInput
from coca.storage import Store
from pipelines.links import read_links
from pipelines.links_config import LinksConfig

PAIRS = {"url": ["http://a/1", "http://a/2"], "caption": ["one", "two"]}


def read(uri: object, **columns: str) -> list[tuple[str | None, str | None]]:
    table = read_links(LinksConfig(uri=str(uri), **columns))
    assert table.schema == pa.schema([("url", pa.string()), ("caption", pa.string())])
    return list(zip(*table.to_pydict().values(), strict=True))


def test_parquet_and_csv_read_alike(tmp_path: Path) -> None:
    pq.write_table(pa.table({**PAIRS, "score": [1.0, 2.0]}), tmp_path / "a.parquet")
    (tmp_path / "b.csv").write_text('score,url,caption\n1,http://a/1,one\n2,http://a/2,"two"\n')
    assert read(tmp_path / "a.parquet") == read(tmp_path / "b.csv") == [("http://a/1", "one"), ("http://a/2", "two")]


def test_named_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"URL": ["http://a/1"], "TEXT": ["one"]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", url_column="URL", caption_column="TEXT") == [("http://a/1", "one")]


def test_missing_values_are_null_whatever_wrote_them(tmp_path: Path) -> None:
    pd.DataFrame({"url": ["http://a/1", None], "caption": [float("nan"), float("nan")]}).to_parquet(
        tmp_path / "nan.parquet"
    )
    pq.write_table(
        pa.table({"url": pa.nulls(1), "caption": pa.array(["x"], pa.large_string())}), tmp_path / "n.parquet"
    )
    (tmp_path / "empty.csv").write_text("url,caption\n,\nhttp://a/1,NaN\n")
    assert read(tmp_path / "nan.parquet") == [("http://a/1", None), (None, None)]
    assert read(tmp_path / "n.parquet") == [(None, "x")]
    assert read(tmp_path / "empty.csv") == [("", ""), ("http://a/1", "NaN")]  # CSV has no missing: a caption may say so


def test_csv_captions_hold_commas_quotes_newlines_and_unicode(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('url,caption\nhttp://a/1,"red, ""big""\nLöwe 🦁"\n', encoding="utf-8")
    assert read(tmp_path / "a.csv") == [("http://a/1", 'red, "big"\nLöwe 🦁')]


def test_folders_and_patterns_read_files_by_name(tmp_path: Path) -> None:
    for name in ("b/2.parquet", "a/1.parquet", "a/x/3.parquet", "_log/4.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"url": [name], "caption": ["c"]}), tmp_path / name)
    (tmp_path / "notes.txt").write_text("not a table")
    assert [url for url, _ in read(tmp_path)] == ["a/1.parquet", "a/x/3.parquet", "b/2.parquet"]
    assert [url for url, _ in read(f"{tmp_path}/*/*.parquet")] == ["a/1.parquet", "b/2.parquet"]
    assert [url for url, _ in read(f"{tmp_path}/?/[12].parquet")] == ["a/1.parquet", "b/2.parquet"]


def test_links_on_s3(s3: str) -> None:
    for name in ("1", "2"):
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"url": [name], "caption": ["c"]}), sink)
        Store(s3).write(f"links/{name}.parquet", sink.getvalue().to_pybytes())
    assert read(f"{s3}/links/1.parquet") == [("1", "c")]
    assert read(f"{s3}/links") == read(f"{s3}/links/*.parquet") == [("1", "c"), ("2", "c")]
    with pytest.raises(BadInput, match="does not exist"):
        read(f"{s3}/links/3.parquet")


@pytest.mark.parametrize(
    ("name", "content", "cause", "way_out"),
    [
        ("missing.parquet", None, "missing.parquet does not exist", "Give a Parquet or CSV file"),
        ("*.csv", None, "no file matches", "Give a Parquet or CSV file"),
        ("links.json", b"[]", "links.json is neither Parquet nor CSV by its name", "Name it .parquet"),
        ("links.csv", b"link,caption\nhttp://a,b\n", "has no column 'url'", "Did you mean 'link'"),
        ("links.csv", b"", "has no column 'url'", "It has none"),
        ("links.csv", b"url,caption\n", "has no rows", "at least one pair"),
        ("links.csv", b"url,caption\nhttp://a,\xff\xfe\n", "invalid UTF8", "in UTF-8"),
        ("links.csv", b"url,caption\nhttp://a,b,c\n", "Expected 2 columns, got 3", "whole"),
        ("links.parquet", b"PAR1 and then nothing", "links.parquet cannot be read", "whole"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, name: str, content: bytes | None, cause: str, way_out: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput) as caught:
        read(tmp_path / name)
    assert cause in caught.value.cause
    assert way_out in caught.value.way_out


def test_a_column_that_holds_no_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": ["a"], "caption": [["a", "list"]]}), tmp_path / "a.parquet")
    with pytest.raises(BadInput, match=r"column 'caption' holds list<.*not text"):
        read(tmp_path / "a.parquet")


def test_no_uri() -> None:
    with pytest.raises(BadInput, match=r"no links table is given\. Name one with --links"):
        read("")
