"""The tokenizer: every caption comes back, and equal fingerprints mean equal tokens."""

import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coca.errors import BadInput
from coca.tokenizer import Tokenizer, train_bpe

CAPTIONS = ["a small red circle in the center", "a large blue star above a ring", "ein Käse, naïve café"] * 3
TOKENIZER = train_bpe(CAPTIONS, vocab_size=400)


def test_special_tokens_come_first_and_frame_every_caption() -> None:
    assert (TOKENIZER.pad_id, TOKENIZER.begin_id, TOKENIZER.end_id) == (0, 1, 2)
    for row in TOKENIZER.encode(CAPTIONS):
        assert (row[0], row[-1]) == (1, 2)
        assert all(token > 2 for token in row[1:-1])


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Cs", "Cc", "Zs", "Zl", "Zp"]), max_size=30))
def test_any_text_has_tokens_and_comes_back(text: str) -> None:
    import unicodedata

    [row] = TOKENIZER.encode([text])
    assert unicodedata.normalize("NFC", TOKENIZER.decode(row)) == unicodedata.normalize(
        "NFC", unicodedata.normalize("NFC", text).lower()
    )


def test_decode_stops_at_the_first_end_and_skips_padding() -> None:
    row = TOKENIZER.encode(["a red circle"])[0]
    assert TOKENIZER.decode([*row, *row, 0, 0]) == "a red circle"


def test_fingerprint_survives_saving_and_tells_tokenizers_apart(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(TOKENIZER.to_json())
    assert Tokenizer.load(tmp_path / "t.json").fingerprint == TOKENIZER.fingerprint
    assert pickle.loads(pickle.dumps(TOKENIZER)).fingerprint == TOKENIZER.fingerprint
    assert train_bpe(CAPTIONS, vocab_size=300).fingerprint != TOKENIZER.fingerprint


def test_special_tokens_in_captions_are_plain_text() -> None:
    [row] = TOKENIZER.encode(["<end> of the <pad> road"])
    assert row.count(2) == 1
    assert 0 not in row


def test_bad_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot read the tokenizer"):
        Tokenizer.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(BadInput, match="is not a tokenizer file"):
        Tokenizer.load(tmp_path / "bad.json")
    with pytest.raises(BadInput, match="--vocab-size 10 is below 259"):
        train_bpe(CAPTIONS, vocab_size=10)
