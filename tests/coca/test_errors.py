"""Errors read as sentences and survive Ray's pickling."""

import pickle

import pytest

from coca.errors import BadInput


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        (("no x", "Give x"), "no x. Give x."),
        (("no x.", "Give x."), "no x. Give x."),
        (("no x",), "no x."),
        (("no x", "Did you mean `y`?"), "no x. Did you mean `y`?"),
    ],
)
def test_it_reads_as_sentences_also_after_pickling(parts: tuple[str, ...], text: str) -> None:
    error = BadInput(*parts)
    assert str(error) == text
    assert str(pickle.loads(pickle.dumps(error))) == text
