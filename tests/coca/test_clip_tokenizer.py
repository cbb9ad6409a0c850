"""CLIP's tokenizer: the ids of open_clip 3.3.0, also after saving, and no file but CLIP's vocabulary."""

import gzip
import json
import pickle
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coca.clip_tokenizer import clean_caption
from coca.errors import BadInput
from coca.feed import pad_tokens
from coca.tokenizer import Tokenizer, clip_tokenizer

DATA = Path(__file__).parents[1] / "data" / "clip_bpe"
VOCABULARY = DATA / "bpe_simple_vocab_16e6.txt.gz"
VECTORS = json.loads((DATA / "clip_bpe_vectors.json").read_text())
CLIP = clip_tokenizer(VOCABULARY)

# Made with open_clip 3.3.0 and ftfy 6.3.1: what the vectors leave out.
CLEANED = {
    "it’s": [585, 568],
    "ＬＯＵＤ　\x93hi\x94 oﬃce": [7464, 257, 1883, 257, 2171],
    "a\x1b[31mb\x1b［0mc\x00d\ufeffe": [13137, 654],
    "e\u0301": [4166],
    "&EACUTE;&amp;amp;amp;amp;lt;": [4166, 283],
    "&EACUTE;&amp;amp;amp;amp;lt;\n<&amp;amp;amp;lt;": [4166, 283, 27, 261, 6259, 282, 3333, 282],
    "<b>e\u0301 &eacute; &EACUTE; &amp;amp;amp;lt;": (
        [283, 321, 285, 4166, 4166, 261, 68, 19734, 282, 261, 6259, 282, 3333, 282]
    ),
    "ΣΑΣ": [139, 225, 138, 109, 139, 480],
    "'ſ'S": [6, 129, 379, 568],
    "x\u0345y!\u0345?": [343, 344, 256, 286],
    "\ud83d\ude00 \ud800x\udc00": [7334, 39802, 343, 39802],
    "?!?": [11395],
    "!–": [0, 1224],
}


def framed(ids: list[int]) -> list[int]:
    return [49406, *ids, 49407]


def test_ids_of_the_special_tokens() -> None:
    assert (CLIP.pad_id, CLIP.begin_id, CLIP.end_id, CLIP.vocab_size) == (0, 49406, 49407, 49_408)


@pytest.mark.parametrize("vector", VECTORS, ids=[repr(vector["text"][:20]) for vector in VECTORS])
def test_vectors_of_open_clip(vector: dict[str, list[int]]) -> None:
    longest = [CLIP.end_id] * 76
    rows = pad_tokens([*CLIP.encode([vector["text"]]), longest], 76, CLIP.pad_id, CLIP.end_id)
    assert rows[0].tolist() == vector["ids"]


def test_cleaning_gives_the_ids_of_open_clip() -> None:
    assert dict(zip(CLEANED, CLIP.encode(list(CLEANED)), strict=True)) == {
        text: framed(ids) for text, ids in CLEANED.items()
    }


def test_text_in_a_wrong_character_set_is_left_alone() -> None:
    assert clean_caption("Caf\xc3\xa9") == "caf\xe3\xa9"


def test_an_endless_character_number_is_no_character() -> None:
    assert clean_caption(f"a &#{'9' * 10_000}; b &#{'9' * 10_000}") == "a \ufffd b \ufffd"


@pytest.mark.parametrize("text", ["<start_of_text>", "<end_of_text>", "<|endoftext|>", "<pad>", "a &lt;END_OF_TEXT> b"])
def test_special_tokens_in_captions_are_text(text: str) -> None:
    [row] = CLIP.encode([text])
    assert not {CLIP.begin_id, CLIP.end_id} & set(row[1:-1])
    assert CLIP.decode(row).replace(" ", "") == clean_caption(text).replace(" ", "")


def test_saving_keeps_tokens_and_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(CLIP.to_json(), encoding="utf-8")
    texts = [*CLEANED, *(vector["text"] for vector in VECTORS)]
    for again in (Tokenizer.load(tmp_path / "tokenizer.json"), pickle.loads(pickle.dumps(CLIP))):
        assert again.fingerprint == CLIP.fingerprint
        assert again.to_json() == CLIP.to_json()
        assert (again.pad_id, again.begin_id, again.end_id, again.vocab_size) == (0, 49406, 49407, 49_408)
        assert again.encode(texts) == CLIP.encode(texts)
        assert [again.decode(row) for row in again.encode(texts)] == [CLIP.decode(row) for row in CLIP.encode(texts)]


@pytest.mark.parametrize("text", ["a photo of a cat", "naïve façade über straße", "日本語の字幕", "emoji 😀👍🏽 test"])
def test_plain_text_comes_back(text: str) -> None:
    assert CLIP.decode(CLIP.encode([text])[0]) == text


@given(st.text(alphabet=st.characters(exclude_categories=["Cs", "Cn"]), max_size=40))
def test_any_text_comes_back_but_for_spaces(text: str) -> None:
    [row] = CLIP.encode([text])
    # U+0345 is in no word of CLIP's.
    expected = "".join(clean_caption(text).replace("\u0345", "").split())
    assert "".join(CLIP.decode(row).split()) == expected


def test_decode_keeps_exclamation_marks_and_drops_padding() -> None:
    [row] = CLIP.encode(["!–"])
    assert row == framed([0, 1224])
    assert CLIP.decode([*row, 0, 0]) == "!–"
    assert CLIP.decode([*row[:-1], 0, 0]) == "!–"
    assert CLIP.decode([0, 0]) == ""


def test_cut_captions_end_with_the_end_token() -> None:
    tokens_BT = pad_tokens(CLIP.encode(["a " * 100]), 76, CLIP.pad_id, CLIP.end_id)
    assert tokens_BT.tolist() == [[49406, *[320] * 74, 49407]]
    assert tokens_BT.dtype == torch.int64


@pytest.mark.parametrize("part", ["amp;", "\u0315\u0300\u05ae", "\x1b[0;", "a", "!", "&#60;\n"])
def test_cleaning_takes_no_quadratic_time(part: str) -> None:
    start = time.monotonic()
    CLIP.encode(["&" + part * (200_000 // len(part))])
    assert time.monotonic() - start < 10


def write_vocabulary(path: Path, lines: list[str]) -> Path:
    path.write_bytes(gzip.compress("\n".join(lines).encode(), compresslevel=1))
    return path


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.gz"
    with pytest.raises(BadInput, match=r"cannot read the vocabulary .*No such file"):
        clip_tokenizer(path)
    with pytest.raises(BadInput, match="cannot read the vocabulary"):
        clip_tokenizer(tmp_path)
    path.write_text("#version: 0.2\ni n\n")
    with pytest.raises(BadInput, match="Not a gzipped file"):
        clip_tokenizer(path)
    path.write_bytes(VOCABULARY.read_bytes()[:1000])
    with pytest.raises(BadInput, match="ended before"):
        clip_tokenizer(path)
    path.write_bytes(VOCABULARY.read_bytes()[:500] + b"\xff" * 500)
    with pytest.raises(BadInput, match="cannot read the vocabulary"):
        clip_tokenizer(path)
    path.write_bytes(gzip.compress(b"\xff\xfe\n" * 50_000))
    with pytest.raises(BadInput, match="codec can't decode"):
        clip_tokenizer(path)


def test_vocabularies_of_another_shape_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.gz"
    lines = gzip.decompress(VOCABULARY.read_bytes()).decode().split("\n")[:48_895]
    clip_tokenizer(write_vocabulary(path, lines))
    with pytest.raises(BadInput, match="has 48,893 merges, CLIP's has 48,894 or more"):
        clip_tokenizer(write_vocabulary(path, lines[:-1]))
    for number, line, cause in [
        (10, "i n g", "line 10 .* is not a pair of tokens: 'i n g'"),
        (10, "in", "line 10 .* is not a pair of tokens: 'in'"),
        (10, "i zzzz", "line 10 .* does not merge two earlier tokens"),
        (10, lines[1], "line 10 .* does not merge two earlier tokens"),
    ]:
        changed = [*lines[: number - 1], line, *lines[number:]]
        with pytest.raises(BadInput, match=cause):
            clip_tokenizer(write_vocabulary(path, changed))


def test_vocabularies_that_unpack_to_too_much_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(b"\n" * (65 * 2**20), compresslevel=1))
    with pytest.raises(BadInput, match="unpacks to more than 64 MB"):
        clip_tokenizer(path)
