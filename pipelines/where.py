"""The filter of ``coca data show --where``: a small language over a dataset's columns, made into an Arrow expression.

::

    filter     = all ("or" all)*
    all        = one ("and" one)*
    one        = "not" one | "(" filter ")" | test
    test       = column ("=" | "!=" | "<" | "<=" | ">" | ">=") value
               | column ["not"] "in" "(" value ("," value)* ")"
               | column ["not"] "contains" text        without regard to case
               | column "is" ["not"] "null"
               | column                                of a column of true and false
    value      = number | 'text' | "text" | true | false

Nothing is evaluated: text becomes tokens, tokens become an expression. A comparison with null is null, as in SQL, and
null is no match.
"""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from coca.errors import BadInput
from pipelines.rows import FIELDS, SCORE_PREFIX

_MAX_DEPTH = 50
_TOKEN = re.compile(
    r"""\s*(?:
      (?P<number>-?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?![\w.]))
    | (?P<text>'(?:[^']|'')*'|"(?:[^"]|"")*")
    | (?P<word>[A-Za-z_]\w*(?:\.[\w-]+)?)
    | (?P<sign><=|>=|!=|<>|==|[=<>(),])
    | (?P<end>\Z)
    )""",
    re.VERBOSE,
)
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "=": lambda a, b: a == b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "<>": lambda a, b: a != b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
}
_KEYWORDS = {"and", "or", "not", "in", "is", "null", "contains", "true", "false"}


class _Token(NamedTuple):
    kind: str
    text: str
    at: int


@dataclass(frozen=True)
class Where:
    """A filter that was understood."""

    text: str
    expression: pc.Expression
    columns: frozenset[str]
    """The columns that it reads (``rows.FIELDS`` and ``scores.NAME``)."""


def parse_where(text: str) -> Where:
    """Understand a filter.

    Raises:
        BadInput: it breaks the grammar, names no column, or compares a column with a value of another kind; says at
            which character.
    """
    parser = _Parser(text)
    expression = parser.filter(0)
    parser.expect_end()
    return Where(text, expression, frozenset(parser.columns))


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = list(self._split())
        self._next = 0
        self.columns: set[str] = set()

    def filter(self, depth: int) -> pc.Expression:
        left = self._all(depth)
        while self._take_word("or"):
            left = left | self._all(depth)
        return left

    def expect_end(self) -> None:
        token = self._peek()
        if token.kind != "end":
            raise self._problem(token, f"{token.text!r} is not expected", "Join two tests by `and` or `or`")

    def _all(self, depth: int) -> pc.Expression:
        left = self._one(depth)
        while self._take_word("and"):
            left = left & self._one(depth)
        return left

    def _one(self, depth: int) -> pc.Expression:
        if depth > _MAX_DEPTH:
            raise self._problem(self._peek(), f"it is nested more than {_MAX_DEPTH} deep", "Write it flatter")
        if self._take_word("not"):
            return ~self._one(depth + 1)
        if self._take_sign("("):
            inner = self.filter(depth + 1)
            self._need_sign(")")
            return inner
        return self._test()

    def _test(self) -> pc.Expression:
        token, kind = self._column()
        field = pc.field(token.text)
        sign = self._peek()
        if sign.kind == "sign" and sign.text in _COMPARE:
            self._next += 1
            return _COMPARE[sign.text](field, self._value(token.text, kind))
        if self._take_word("is"):
            negated = self._take_word("not")
            self._need_word("null")
            return ~field.is_null() if negated else field.is_null()
        negated = self._take_word("not")
        if self._take_word("in"):
            # Unequal to itself is null or nothing: so a null stays null, and `not` leaves it out as `!=` does.
            tested = field.isin(pa.array(self._values(token.text, kind), kind)) | (field != field)
        elif self._take_word("contains"):
            tested = self._contains(token, kind)
        elif pa.types.is_boolean(kind) and not negated:
            return field
        else:
            raise self._problem(
                self._peek(),
                f"a test is expected after {token.text!r}",
                "Write one of = != < <= > >=, in (...), contains 'text', is null",
            )
        return ~tested if negated else tested

    def _contains(self, column: _Token, kind: pa.DataType) -> pc.Expression:
        token = self._peek()
        if not pa.types.is_string(kind):
            raise self._problem(column, f"{column.text!r} holds no text", "`contains` is for text; compare it with =")
        if token.kind != "text":
            raise self._problem(token, "a text is expected after `contains`", "Write contains 'words'")
        self._next += 1
        return pc.match_substring(pc.field(column.text), _unquote(token.text), ignore_case=True)

    def _column(self) -> tuple[_Token, pa.DataType]:
        token = self._take()
        if token.kind != "word" or token.text in _KEYWORDS:
            found = "the end" if token.kind == "end" else repr(token.text)
            raise self._problem(token, f"a column is expected, not {found}", _columns_told())
        is_score = token.text.startswith(SCORE_PREFIX) and len(token.text) > len(SCORE_PREFIX)
        kind = pa.float32() if is_score else FIELDS.get(token.text)
        if kind is None:
            near = difflib.get_close_matches(token.text, FIELDS, n=1, cutoff=0.0)[0]
            raise self._problem(
                token, f"there is no column {token.text!r}", f"Did you mean {near!r}? {_columns_told()}"
            )
        self.columns.add(token.text)
        return token, kind

    def _values(self, column: str, kind: pa.DataType) -> list[Any]:
        self._need_sign("(")
        values = [self._value(column, kind).as_py()]
        while self._take_sign(","):
            values.append(self._value(column, kind).as_py())
        self._need_sign(")")
        if pa.types.is_integer(kind) and any(isinstance(value, float) for value in values):
            values = [int(value) for value in values if float(value).is_integer()]
        limit = 2 ** (kind.bit_width - 1) if pa.types.is_integer(kind) else 0
        return [value for value in values if not limit or -limit <= value < limit]

    def _value(self, column: str, kind: pa.DataType) -> pa.Scalar:
        token = self._take()
        if token.kind == "number" and (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
            # A score of 0.7 is stored as the nearest float32, and is meant by 0.7.
            return pa.scalar(float(token.text), kind) if pa.types.is_floating(kind) else _number(token.text)
        if token.kind == "text" and pa.types.is_string(kind):
            return pa.scalar(_unquote(token.text))
        if token.kind == "text" and pa.types.is_timestamp(kind):
            return self._moment(token, kind)
        if token.kind == "word" and token.text in ("true", "false") and pa.types.is_boolean(kind):
            return pa.scalar(token.text == "true")
        found = "the end" if token.kind == "end" else token.text
        raise self._problem(token, f"{column!r} is compared with {_kind_told(kind)}, not with {found}", "")

    def _moment(self, token: _Token, kind: pa.DataType) -> pa.Scalar:
        try:
            moment = datetime.fromisoformat(_unquote(token.text))
        except ValueError:
            raise self._problem(token, f"{token.text} is no time", "Write '2026-01-31' or '2026-01-31T18:00'") from None
        return pa.scalar(moment if moment.tzinfo else moment.replace(tzinfo=UTC), kind)

    def _split(self) -> Any:
        at = 0
        while True:
            found = _TOKEN.match(self._text, at)
            if found is None or found.lastgroup is None:
                start = at + len(self._text[at:]) - len(self._text[at:].lstrip())
                mark = self._text[start]
                wrong = "a text that does not end" if mark in "'\"" else f"{mark!r} has no meaning"
                raise self._problem(_Token("", mark, start), wrong, "Texts stand in quotes: language = 'en'")
            kind, text = found.lastgroup, found[found.lastgroup]
            # Keywords in any case; a column keeps its own.
            text = text.lower() if kind == "word" and text.lower() in _KEYWORDS else text
            yield _Token(kind, text, found.start(kind))
            if kind == "end":
                return
            at = found.end()

    def _peek(self) -> _Token:
        return self._tokens[self._next]

    def _take(self) -> _Token:
        token = self._peek()
        self._next += token.kind != "end"
        return token

    def _take_word(self, word: str) -> bool:
        return self._take_if(_Token("word", word, 0))

    def _take_sign(self, sign: str) -> bool:
        return self._take_if(_Token("sign", sign, 0))

    def _take_if(self, wanted: _Token) -> bool:
        found = self._peek()[:2] == wanted[:2]
        self._next += found
        return found

    def _need_word(self, word: str) -> None:
        if not self._take_word(word):
            raise self._problem(self._peek(), f"`{word}` is expected", "")

    def _need_sign(self, sign: str) -> None:
        if not self._take_sign(sign):
            raise self._problem(self._peek(), f"`{sign}` is expected", "")

    def _problem(self, token: _Token, what: str, way_out: str) -> BadInput:
        rest = self._text[token.at : token.at + 24]
        place = f"character {token.at + 1}, at {rest!r}" if rest.strip() else "its end"
        return BadInput(f"--where cannot be read ({place}): {what}", way_out)


def _number(text: str) -> pa.Scalar:
    whole = re.fullmatch(r"-?\d+", text) is not None and -(2**63) <= int(text) < 2**63
    return pa.scalar(int(text)) if whole else pa.scalar(float(text))


def _unquote(text: str) -> str:
    return text[1:-1].replace(text[0] * 2, text[0])


def _kind_told(kind: pa.DataType) -> str:
    if pa.types.is_string(kind):
        return "a text in quotes"
    if pa.types.is_timestamp(kind):
        return "a time in quotes"
    return "true or false" if pa.types.is_boolean(kind) else "a number"


def _columns_told() -> str:
    return f"Columns: {', '.join(FIELDS)}, {SCORE_PREFIX}NAME"
