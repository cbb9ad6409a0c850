"""Rules on a caption: length, repetition, blocked words."""

import re
from collections.abc import Iterable, Sequence
from itertools import compress

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from coca.contract import Reason
from coca.errors import BadInput
from pipelines.block_lists import read_lines
from pipelines.judge_config import JudgeConfig

_WORD = re.compile(r"[^\W_]+")


class BlockedWords:
    """Words and phrases, found as whole words (runs of letters and digits) in any case.

    ``ass`` is not found in ``class``. Scripts that write without spaces have no words to be found in.
    """

    def __init__(self, entries: Iterable[str]) -> None:
        phrases = {tuple(_WORD.findall(entry.casefold())) for entry in entries}
        self._words = frozenset(phrase[0] for phrase in phrases if len(phrase) == 1)
        self._phrases = frozenset(phrase for phrase in phrases if len(phrase) > 1)
        self._lengths = sorted({len(phrase) for phrase in self._phrases})
        self._starts = frozenset(phrase[0] for phrase in self._phrases)

    def __len__(self) -> int:
        return len(self._words) + len(self._phrases)

    def found_in(self, caption: str) -> bool:
        """Whether a caption holds one of them."""
        words = _WORD.findall(caption.casefold())
        if not self._words.isdisjoint(words):
            return True
        return not self._starts.isdisjoint(words) and self._holds_phrase(words)

    def _holds_phrase(self, words: list[str]) -> bool:
        return any(
            tuple(words[place : place + length]) in self._phrases
            for place, word in enumerate(words)
            if word in self._starts
            for length in self._lengths
        )


def load_blocked_words(uri: str) -> BlockedWords:
    """A list of words and phrases, one a line; ``#`` for comments, ``.gz`` allowed.

    Raises:
        BadInput: no such file, nothing in it, or a line without a letter or digit.
    """
    entries = []
    for number, entry in read_lines(uri):
        if not _WORD.search(entry):
            raise BadInput(f"{uri}, line {number}: {entry[:80]!r} holds no word", "Take the line out")
        entries.append(entry)
    return BlockedWords(entries)


def word_repetition(caption: str) -> float:
    """The share of a caption's words that occur in it before: 1 - distinct / all, case folded, split at whitespace."""
    words = caption.casefold().split()
    return (len(words) - len(set(words))) / len(words) if words else 0.0


def judge_captions(captions: Sequence[str], config: JudgeConfig, blocked: BlockedWords | None = None) -> pa.Array:
    """The first rule that each caption (its whitespace collapsed) breaks: (N,) string, null where it keeps all."""
    reasons = _judge_lengths(pa.array(captions, pa.string()), config)
    if config.max_word_repetition is None and blocked is None:
        return reasons
    passed = reasons.is_null().to_numpy(zero_copy_only=False)
    found = [_judge_words(caption, config, blocked) for caption in compress(captions, passed)]
    return pc.replace_with_mask(reasons, pa.array(passed), pa.array(found, pa.string()))


def _judge_lengths(captions: pa.Array, config: JudgeConfig) -> pa.Array:
    chars = pc.utf8_length(captions).to_numpy()
    words = pc.count_substring(captions, " ").to_numpy() + 1
    rules = [
        (chars == 0, Reason.EMPTY_CAPTION),
        ((words < config.min_words) | (chars < config.min_chars), Reason.CAPTION_TOO_SHORT),
        ((words > config.max_words) | (chars > config.max_chars), Reason.CAPTION_TOO_LONG),
    ]
    broken = np.select([mask for mask, _ in rules], range(len(rules)), default=len(rules))
    names = pa.array([reason.value for _, reason in rules] + [None], pa.string())
    return names.take(pa.array(broken))


def _judge_words(caption: str, config: JudgeConfig, blocked: BlockedWords | None) -> str | None:
    if config.max_word_repetition is not None and word_repetition(caption) > config.max_word_repetition:
        return Reason.CAPTION_REPEATS.value
    if blocked is not None and blocked.found_in(caption):
        return Reason.CAPTION_BLOCKED_WORD.value
    return None
