"""The tokenizer: every caption comes back, and equal fingerprints mean equal tokens."""

import json
import pickle
import random
import unicodedata
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from coca.errors import BadInput
from coca.tokenizer import Tokenizer, train_bpe, train_unigram

CAPTIONS = ["a small red circle in the center", "a large blue star above a ring", "ein Käse, naïve café"] * 3
TOKENIZER = train_bpe(CAPTIONS, vocab_size=400)
UNIGRAM = train_unigram([*CAPTIONS, "stars and rings and circles"], vocab_size=400)
both = pytest.mark.parametrize("tokenizer", [TOKENIZER, UNIGRAM], ids=["bpe", "unigram"])
train_both = pytest.mark.parametrize("train", [train_bpe, train_unigram])


@both
def test_special_tokens_come_first_and_frame_every_caption(tokenizer: Tokenizer) -> None:
    assert (tokenizer.pad_id, tokenizer.begin_id, tokenizer.end_id) == (0, 1, 2)
    for row in tokenizer.encode(CAPTIONS):
        assert (row[0], row[-1]) == (1, 2)
        assert all(token > 2 for token in row[1:-1])


@both
@given(text=st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Cs", "Zs", "Zl", "Zp"]), max_size=30))
def test_any_text_has_tokens_and_comes_back(tokenizer: Tokenizer, text: str) -> None:
    """Also controls, emoji and letters that no caption had: every byte has an entry."""
    [row] = tokenizer.encode([text])
    lowered = unicodedata.normalize("NFC", text).lower()
    assert unicodedata.normalize("NFC", tokenizer.decode(row)) == unicodedata.normalize("NFC", lowered).strip()
    assert all(2 < token < tokenizer.vocab_size for token in row[1:-1])


@both
def test_every_byte_has_an_entry_of_its_own(tokenizer: Tokenizer) -> None:
    entries = json.loads(tokenizer.to_json())["model"]["vocab"]
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    assert len(alphabet) == 256
    assert alphabet <= {entry if isinstance(entry, str) else entry[0] for entry in entries}
    assert tokenizer.decode(tokenizer.encode(["🙂👨‍👩‍👧 漢字 \x00\x7f"])[0]) == "🙂👨‍👩‍👧 漢字 \x00\x7f"


@train_both
def test_the_same_captions_give_the_same_tokenizer(train: Callable[..., Tokenizer]) -> None:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 9))) for _ in range(300)]
    captions = [" ".join(rng.choices(words, k=6)) for _ in range(500)]
    first, again, smaller = train(captions, 600), train(iter(captions), 600), train(captions, 300)
    assert first.fingerprint == again.fingerprint != smaller.fingerprint
    assert smaller.vocab_size == 300
    assert max(map(len, first.encode(captions))) < max(map(len, smaller.encode(captions)))


@train_both
def test_captions_are_streamed(train: Callable[..., Tokenizer]) -> None:
    """Each is asked for when the ones before it are counted, not all at once."""
    held: list[weakref.ref[object]] = []
    most = 0

    class Caption(str):
        pass

    def captions() -> Iterator[str]:
        nonlocal most
        for number in range(20_000):
            caption = Caption(f"a red circle {number % 7}")
            held.append(weakref.ref(caption))
            yield caption
            if number % 500 == 499:
                held[:] = [each for each in held if each() is not None]
                most = max(most, len(held))

    train(captions(), 300)
    assert 0 < most < 5000


def test_captions_without_a_word() -> None:
    with pytest.raises(BadInput, match="hold no word"):
        train_unigram(["", ""], 300)
    assert train_bpe(["", ""], 300).vocab_size == 259


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
    with pytest.raises(BadInput, match="--vocab-size 259 is below 260"):
        train_unigram(CAPTIONS, vocab_size=259)
