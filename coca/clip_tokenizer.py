"""CLIP's byte-level BPE: its vocabulary file, and how it cleans a caption before it looks for words.

OpenAI's CLIP and open_clip clean with the package ftfy. Of what it does, all that single characters decide is done
here; left out is its guessing at text decoded with the wrong character set ("cafÃ©"), which changes with its versions.
Another difference: special tokens written in a caption are text.
"""

import gzip
import html
import re
import unicodedata
import zlib
from html.entities import html5
from pathlib import Path

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as HuggingFaceTokenizer

from coca.errors import BadInput

CLIP_BEGIN, CLIP_END = "<start_of_text>", "<end_of_text>"
CLIP_PAD = "!"
"""The token of id 0, which occurs in captions as well."""

END_OF_WORD = "</w>"
VOCAB_SIZE = 49_408
_MERGES = VOCAB_SIZE - 2 * 256 - 2
_MAX_BYTES = 64 * 2**20
# CLIP matches without case and so takes U+0345, whose upper case is a letter, neither for a letter nor for a sign.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}\x{345}]+"
_MAX_PASSES = 32  # "&amp;amp;amp;..." uncovers one entity in each
_WAY_OUT = "Give OpenAI's bpe_simple_vocab_16e6.txt.gz"


def clip_bpe(path: str | Path) -> HuggingFaceTokenizer:
    """The BPE of a vocabulary file; captions go through `clean_caption` first.

    Raises:
        BadInput: the file cannot be read or is no CLIP vocabulary.
    """
    merges = _read_merges(path)
    byte_tokens = sorted(pre_tokenizers.ByteLevel.alphabet())  # by code point, which is the order of CLIP's ids
    tokens = byte_tokens + [token + END_OF_WORD for token in byte_tokens]
    known = set(tokens)
    for number, (left, right) in enumerate(merges, start=2):
        if left not in known or right not in known or left + right in known:
            raise BadInput(f"line {number} of {path} does not merge two earlier tokens into a new one", _WAY_OUT)
        tokens.append(left + right)
        known.add(left + right)
    tokens += [CLIP_BEGIN, CLIP_END]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    return _assemble(models.BPE(vocab=vocab, merges=merges, end_of_word_suffix=END_OF_WORD))


def _read_merges(path: str | Path) -> list[tuple[str, str]]:
    """The merges that CLIP uses; the file goes on with some 200,000 that it does not."""
    try:
        with gzip.open(path) as file:
            data = file.read(_MAX_BYTES + 1)
        text = data.decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read the vocabulary {path}: {error}", _WAY_OUT) from None
    if len(data) > _MAX_BYTES:
        raise BadInput(f"the vocabulary {path} unpacks to more than {_MAX_BYTES // 2**20} MB", _WAY_OUT)
    lines = text.split("\n", _MERGES + 1)[1 : _MERGES + 1]
    if len(lines) < _MERGES:
        raise BadInput(f"the vocabulary {path} has {len(lines):,} merges, CLIP's has {_MERGES:,} or more", _WAY_OUT)
    merges = []
    for number, line in enumerate(lines, start=2):
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise BadInput(f"line {number} of {path} is not a pair of tokens: {line[:60]!r}", _WAY_OUT)
        merges.append((left, right))
    return merges


def _assemble(bpe: models.BPE) -> HuggingFaceTokenizer:
    inner = HuggingFaceTokenizer(bpe)
    # `clean_caption` has done this already; other readers of the saved file have only this.
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    # A token with a character outside the byte alphabet is not decoded from it: hence its sign for a space, not " ".
    inner.decoder = decoders.Sequence([decoders.Replace(END_OF_WORD, "Ġ"), decoders.ByteLevel()])
    inner.add_special_tokens([CLIP_BEGIN, CLIP_END])
    return inner


def clean_caption(text: str) -> str:
    """The caption as CLIP's BPE sees it: plain characters, no entities, single spaces, lower case."""
    return " ".join(_unescape(_unescape(_plain(text))).split()).lower()


def _unescape(text: str) -> str:
    """`html.unescape`, which itself fails at a number too long for `int`."""
    return html.unescape(_ENDLESS_NUMBER.sub("\ufffd", text))


def _plain(text: str) -> str:
    """Line by line; from the first line with a ``<`` on, text counts as markup, whose entities mean something."""
    lines, markup = [], False
    for line in text.split("\n"):
        markup = markup or "<" in line
        lines.append(_plain_line(line, markup))
    return "\n".join(lines)


def _plain_line(line: str, markup: bool) -> str:
    """Repeated until nothing changes, because what one step uncovers is another's business."""
    for _ in range(_MAX_PASSES):
        before = line
        if not markup:
            line = _ENTITY.sub(_character, line)
        line = _join_surrogates(line.translate(_PLAIN_FORMS))
        line = _NFC.normalize_str(_TERMINAL_ESCAPE.sub("", line).translate(_CONTROLS))
        if line == before:
            break
    return line


def _character(entity: re.Match[str]) -> str:
    """What an entity stands for; unknown ones stay. "&EACUTE;" counts as a shouted "&eacute;"."""
    name = entity[0][1:]
    if name in html5:
        return html5[name]
    character = html.unescape(entity[0])
    if name.startswith("#"):
        return entity[0] if ";" in character else character
    if name.isupper() and name.lower() in html5 and character == entity[0]:
        return html5[name.lower()].upper()
    return entity[0]


def _join_surrogates(text: str) -> str:
    """UTF-16 halves joined; a lone one, which no UTF-8 can hold, becomes U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _plain_forms() -> dict[int, str]:
    """Characters with a plainer form: curly quotes, Latin ligatures and digraphs, full and half width, C1 controls."""
    forms = dict.fromkeys([0x2BC, *range(0x2018, 0x201C)], "'") | dict.fromkeys(range(0x201C, 0x2020), '"')
    # Latin digraphs and ligatures; of the long s in U+FB05 only the ligature is undone.
    for code in [0x132, 0x133, 0x149, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4), *range(0xFB00, 0xFB07)]:
        forms[code] = unicodedata.normalize("NFKC", chr(code))
    forms[0xFB05] = "ſt"
    widths = {code: unicodedata.normalize("NFKC", chr(code)) for code in [0x3000, *range(0xFF01, 0xFFF0)]}
    forms |= {code: form for code, form in widths.items() if form != chr(code)}
    # As browsers do: bytes 0x80 to 0x9F in pages that say Latin-1 are Windows-1252, where that has a character.
    windows = {code: bytes([code]).decode("cp1252", "ignore") for code in range(0x80, 0xA0)}
    return forms | {code: form for code, form in windows.items() if form}


_ENDLESS_NUMBER = re.compile("&#[0-9]{500,};?")
_ENTITY = re.compile("&#?[0-9A-Za-z]{1,24};")
_NFC = normalizers.NFC()  # `unicodedata.normalize` takes quadratic time for a run of combining marks
_TERMINAL_ESCAPE = re.compile("\x1b\\[[0-9;]*[a-zA-Z]")
_PLAIN_FORMS = _plain_forms() | {0x2028: "\n", 0x2029: "\n", 0x0D: "\n"}
# Controls without a meaning in text. Tab, line feed and form feed are spaces; joiners and direction marks are text.
_CONTROLS = dict.fromkeys(
    [*range(0x09), 0x0B, *range(0x0E, 0x20), 0x7F, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD)]
)
