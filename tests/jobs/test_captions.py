from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from coca.errors import BadInput
from coca.storage import Store
from jobs.captions import read_column


def read(uri: object, column: str = "caption") -> list[str]:
    return [text for batch in read_column(str(uri), column) for text in batch]


def test_csv_keeps_numbers_as_text_and_line_breaks_inside_quotes(tmp_path: Path):
    (tmp_path / "links.csv").write_text('url,caption\nhttp://a,2024\nhttp://b,"a red\ncat"\n')
    assert read(tmp_path / "links.csv") == ["2024", "a red\ncat"]


def test_tsv(tmp_path: Path):
    (tmp_path / "links.tsv").write_text("caption\turl\na, b\thttp://a\n")
    assert read(tmp_path / "links.tsv") == ["a, b"]


def test_folder_of_parquet_in_batches_without_nulls(tmp_path: Path):
    pq.write_table(pa.table({"text": ["a", None, "b"]}), tmp_path / "1.parquet")
    pq.write_table(pa.table({"text": [str(n) for n in range(10_000)]}), tmp_path / "2.parquet")
    (tmp_path / "README.txt").write_text("not a table")
    assert read(tmp_path, "text") == ["a", "b", *map(str, range(10_000))]
    assert max(len(batch) for batch in read_column(str(tmp_path), "text")) <= 8192


def test_parquet_on_s3(s3: str, tmp_path: Path):
    pq.write_table(pa.table({"caption": ["a red cat"]}), tmp_path / "links.parquet")
    Store(s3).write("links.parquet", (tmp_path / "links.parquet").read_bytes())
    assert read(f"{s3}/links.parquet") == ["a red cat"]


def test_a_published_table_without_a_header(tmp_path: Path):
    (tmp_path / "cc3m.tsv").write_text("a red cat\thttp://a\n")
    assert [text for batch in read_column(str(tmp_path), "caption", "cc3m") for text in batch] == ["a red cat"]


@pytest.mark.parametrize(
    ("name", "content", "column", "message"),
    [
        (
            "links.csv",
            "url,text\na,b\n",
            "caption",
            "no column 'caption'. .*It has url, text; name yours with --column",
        ),
        ("links.csv", "", "caption", "has no column 'caption'. It has none"),
        ("links.parquet", "not parquet at all", "caption", "cannot be read: .*magic bytes"),
        ("links.json", "{}", "caption", "links.json is no Parquet, CSV, TSV or JSON lines file by its name"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path: Path, name: str, content: str, column: str, message: str):
    (tmp_path / name).write_text(content)
    with pytest.raises(BadInput, match=message):
        read(tmp_path / name, column)


def test_missing_mixed_and_nested(tmp_path: Path):
    with pytest.raises(BadInput, match=r"nope\.csv does not exist"):
        read(tmp_path / "nope.csv")
    pq.write_table(pa.table({"caption": ["b"]}), tmp_path / "2.parquet")
    (tmp_path / "1.csv").write_text("caption\na\n")
    assert read(tmp_path) == ["a", "b"]
    pq.write_table(pa.table({"caption": [[1, 2]]}), tmp_path / "3.parquet")
    with pytest.raises(BadInput, match=r"holds list<.*not text"):
        read(tmp_path)
