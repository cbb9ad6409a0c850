"""Reading tables of links as strangers wrote them."""

import gzip
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from coca.errors import BadInput
from coca.storage import Store
from pipelines import links
from pipelines.links import LINKS_TABLE, list_pieces, read_links, read_piece, read_texts
from pipelines.links_config import LinksConfig

PAIRS = {"url": ["http://a/1", "http://a/2"], "caption": ["one", "two"]}
READ = [("http://a/1", "one"), ("http://a/2", "two")]


def read(uri: object, **settings: object) -> list[tuple[str | None, str | None]]:
    return [(row["url"], row["caption"]) for row in rows(uri, **settings)]


def rows(uri: object, **settings: object) -> list[dict[str, str | None]]:
    table = read_links(LinksConfig(uri=str(uri), **settings))
    assert table.schema == LINKS_TABLE
    return table.to_pylist()


def extras(uri: object, **settings: object) -> list[object]:
    return [json.loads(row["extra"]) if row["extra"] else None for row in rows(uri, **settings)]


def test_every_format_reads_alike(tmp_path: Path) -> None:
    pq.write_table(pa.table({**PAIRS, "score": [1.0, 2.0]}), tmp_path / "a.parquet")
    csv = '\ufeffscore,url,caption\n1,http://a/1,one\n\n2,http://a/2,"two"\n'
    lines = "\ufeff" + "".join(json.dumps({"url": u, "n": 1, "caption": c}) + "\n\n" for u, c in READ)
    (tmp_path / "b.csv").write_text(csv, encoding="utf-8")
    (tmp_path / "c.tsv").write_text(csv.replace(",", "\t"), encoding="utf-8")
    (tmp_path / "d.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "e.ndjson.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "f.csv.gz").write_bytes(gzip.compress(csv[:30].encode()) + gzip.compress(csv[30:].encode()))
    for name in ("a.parquet", "b.csv", "c.tsv", "d.jsonl", "e.ndjson.gz", "f.csv.gz"):
        assert read(tmp_path / name) == READ, name
    assert read(tmp_path) == READ * 6


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
    (tmp_path / "j.jsonl").write_text('{"url": "http://a/1", "caption": null}\n{"url": 5, "caption": NaN}\n{}\n')
    assert read(tmp_path / "nan.parquet") == [("http://a/1", None), (None, None)]
    assert read(tmp_path / "n.parquet") == [(None, "x")]
    assert read(tmp_path / "empty.csv") == [("", ""), ("http://a/1", "NaN")]  # CSV has no missing: a caption may say so
    assert read(tmp_path / "j.jsonl") == [("http://a/1", None), ("5", None), (None, None)]


def test_captions_hold_commas_quotes_newlines_and_unicode(tmp_path: Path) -> None:
    caption = 'red, "big"\nLöwe 🦁'
    (tmp_path / "a.csv").write_text('url,caption\nhttp://a/1,"red, ""big""\nLöwe 🦁"\n', encoding="utf-8")
    (tmp_path / "a.jsonl").write_text(json.dumps({"url": "http://a/1", "caption": caption}) + "\n")
    (tmp_path / "half.jsonl").write_text('{"url": "http://a/1", "caption": "half \\ud83e"}\n')
    assert read(tmp_path / "a.csv") == read(tmp_path / "a.jsonl") == [("http://a/1", caption)]
    assert read(tmp_path / "half.jsonl") == [("http://a/1", "half ?")]


def test_extra_columns_are_a_json_object(tmp_path: Path) -> None:
    columns = {"z": [float("nan"), 0.5], "boxes": [[[1.0, float("inf")]], None], "id": [2**60, None]}
    pq.write_table(pa.table({**PAIRS, **columns}), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("id,url,caption,z\n7,http://a/1,one,x\n")
    (tmp_path / "a.jsonl").write_text('{"url": "u", "caption": "c", "id": {"n": 1}}\n{"z": "\\ud83e", "caption": ""}\n')
    first = {"z": None, "boxes": [[1.0, None]], "id": 2**60}
    assert extras(tmp_path / "a.parquet", extra_columns=["*"]) == [first, {"z": 0.5, "boxes": None, "id": None}]
    assert rows(tmp_path / "a.parquet", extra_columns=["z", "id"])[0]["extra"] == f'{{"id": {2**60}, "z": null}}'
    assert extras(tmp_path / "a.csv", extra_columns=["*"]) == [{"id": "7", "z": "x"}]
    assert extras(tmp_path / "a.jsonl", extra_columns=["*"]) == [{"id": {"n": 1}}, {"z": "?"}]
    assert extras(tmp_path / "a.jsonl", extra_columns=["id"]) == [{"id": {"n": 1}}, {"id": None}]
    assert extras(tmp_path / "a.csv") == [None]
    with pytest.raises(BadInput, match=r"has no column 'ids'\. Did you mean 'id'"):
        read(tmp_path / "a.csv", extra_columns=["ids"])


def test_folders_and_patterns_read_files_by_name(tmp_path: Path) -> None:
    for name in ("b/2.parquet", "a/1.parquet", "a/x/3.parquet", "_log/4.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"url": [name], "caption": ["c"]}), tmp_path / name)
    (tmp_path / "notes.txt").write_text("not a table")
    assert [url for url, _ in read(tmp_path)] == ["a/1.parquet", "a/x/3.parquet", "b/2.parquet"]
    assert [url for url, _ in read(f"{tmp_path}/*/*.parquet")] == ["a/1.parquet", "b/2.parquet"]
    assert [url for url, _ in read(f"{tmp_path}/?/[12].parquet")] == ["a/1.parquet", "b/2.parquet"]


def test_pieces_are_stretches_of_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "PIECE_ROWS", 5)
    numbers = [str(n) for n in range(14)]
    pq.write_table(pa.table({"url": numbers, "caption": numbers}), tmp_path / "a.parquet", row_group_size=2)
    pq.write_table(pa.table({"url": ["x"] * 9, "caption": ["y"] * 9}), tmp_path / "b.parquet")
    (tmp_path / "c.csv").write_text("url,caption\na,b\n")
    config = LinksConfig(uri=str(tmp_path))
    pieces = [pickle.loads(pickle.dumps(piece)) for piece in list_pieces(config)]
    assert [(Path(piece.uri).name, piece.row_groups, piece.rows) for piece in pieces] == [
        ("a.parquet", (0, 1), 4),
        ("a.parquet", (2, 3), 4),
        ("a.parquet", (4, 5), 4),
        ("a.parquet", (6,), 2),
        ("b.parquet", (0,), 9),
        ("c.csv", None, None),
    ]
    assert [t["url"].to_pylist() for t in read_piece(pieces[1], config)] == [["4", "5", "6", "7"]]
    assert read_links(config)["url"].to_pylist() == [*numbers, *["x"] * 9, "a"]


def test_the_fingerprint_changes_with_the_content(tmp_path: Path) -> None:
    def fingerprint() -> str:
        return list_pieces(LinksConfig(uri=str(tmp_path / "a.csv")))[0].fingerprint

    (tmp_path / "a.csv").write_text("url,caption\na,b\n")
    before = fingerprint()
    assert fingerprint() == before
    (tmp_path / "a.csv").write_text("url,caption\na,bc\n")
    assert fingerprint() != before


def test_texts_of_one_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [str(n) for n in range(10_000)]}), tmp_path / "a.parquet")
    batches = list(read_texts(str(tmp_path), "text"))
    assert [len(batch) for batch in batches] == [8192, 1808]
    assert [text for batch in batches for text in batch.to_pylist()] == [str(n) for n in range(10_000)]


def test_links_on_s3(s3: str) -> None:
    for name in ("1", "2"):
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"url": [name], "caption": ["c"]}), sink)
        Store(s3).write(f"links/{name}.parquet", sink.getvalue().to_pybytes())
    store = Store(s3)
    with store.filesystem.open_output_stream(store.path("links/3.jsonl.gz"), compression=None) as stream:
        stream.write(gzip.compress(b'{"url": "3", "caption": "c"}'))
    assert read(f"{s3}/links/1.parquet") == [("1", "c")]
    assert read(f"{s3}/links/*.parquet") == [("1", "c"), ("2", "c")]
    assert read(f"{s3}/links") == [("1", "c"), ("2", "c"), ("3", "c")]
    with pytest.raises(BadInput, match="does not exist"):
        read(f"{s3}/links/4.parquet")


def test_links_from_the_web(web: SimpleNamespace, pages: SimpleNamespace, tmp_path: Path) -> None:
    pq.write_table(pa.table(PAIRS), tmp_path / "a.parquet")
    body = (tmp_path / "a.parquet").read_bytes()
    web.pages["/a.parquet?key=secret"] = pages.answer(200, body, "ETag: 1")
    web.pages["/cut.csv"] = pages.answer(200, b"url,caption\na,b\n", length=100)
    (piece,) = list_pieces(LinksConfig(uri=f"{web.url}/a.parquet?key=secret"))
    assert (piece.row_groups, piece.rows, piece.fingerprint) == (None, None, f"{len(body)}|1|")
    assert read(f"{web.url}/a.parquet?key=secret") == READ
    for name, cause in (("gone.csv", "answers 404 X"), ("cut.csv", "ended after 16 of 100 bytes"), ("x", "is no Parq")):
        with pytest.raises(BadInput, match=cause):
            read(f"{web.url}/{name}")
    with pytest.raises(BadInput, match="is larger than 10 bytes") as caught:
        read(f"{web.url}/a.parquet?key=secret", max_download_bytes=10)
    assert "secret" not in str(caught.value)
    with pytest.raises(BadInput, match=r"cannot be fetched: .*refused"):
        read("http://127.0.0.1:9/a.csv")


TRUNCATED = gzip.compress(b"url,caption\n" + b"a,b\n" * 1000)[:-12]


@pytest.mark.parametrize(
    ("name", "content", "cause", "way_out"),
    [
        ("missing.parquet", None, "missing.parquet does not exist", "Give a Parquet, CSV"),
        ("*.csv", None, "no file matches", "Give a Parquet, CSV"),
        ("links.json", b"[]", "links.json is no Parquet, CSV, TSV or JSON lines file by its name", "Name it .parquet"),
        ("links.csv", b"link,caption\nhttp://a,b\n", "has no column 'url'", "Did you mean 'link'"),
        ("links.csv", b"", "has no column 'url'", "It has none; name yours with --url-column"),
        ("links.csv", b"url,caption\n", "has no rows", "at least one pair"),
        ("links.csv", b"url,caption\na,b\nhttp://a,\xff\xfe\n", "links.csv line 3 cannot be read: it is not UTF-8", ""),
        ("links.csv", b'url,caption\na,"x\ny"\nc,d,e\n', "line 4 cannot be read: it has 3 fields, the header 2", ""),
        ("links.csv", b'url,caption\na,"b\nc,d\n', "line 3 cannot be read: unexpected end of data", ""),
        ("links.csv.gz", TRUNCATED, "links.csv.gz cannot be read: Truncated compressed stream", "whole"),
        ("links.parquet", b"PAR1 and then nothing", "links.parquet cannot be read", "whole"),
        (
            "links.jsonl",
            b'{"url": "a", "caption": "b"}\n{"url": \n',
            "links.jsonl line 2 cannot be read: it is not",
            "",
        ),
        ("links.jsonl", b"[" * 100_000, "line 1 cannot be read: it is not JSON", ""),
        ("links.jsonl", b'{"url": 1' + b"0" * 5000 + b"}", "line 1 cannot be read: it is not JSON", ""),
        ("links.jsonl", b"[1]\n", "line 1 cannot be read: it holds a list, not an object", ""),
        ("links.jsonl", b'{"url": "a", "caption": ["b"]}\n', "line 1 cannot be read: 'caption' holds a list", ""),
        ("links.jsonl", b'{"url": "a", "text": "b"}\n', "has no column 'caption'", "It has url, text"),
        ("links.jsonl", b"", "has no column 'url'", "It has none"),
        ("links.jsonl", b'{"a": "' + b"x" * (16 << 20) + b'"}', "line 1 cannot be read: it is longer", ""),
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
    bytes_as_text = pa.array([b"\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"url": ["a"], "caption": bytes_as_text}), tmp_path / "a.parquet")
    with pytest.raises(BadInput, match=r"cannot be read: Invalid.*UTF8"):
        read(tmp_path / "a.parquet")


def test_no_uri() -> None:
    with pytest.raises(BadInput, match=r"no links table is given\. Name one with --links"):
        read("")
