"""Captions of links tables, streamed, for the training of a tokenizer."""

from collections.abc import Iterator

from pipelines.links import read_texts
from pipelines.links_config import PresetName


def read_column(uri: str, column: str, preset: PresetName = "") -> Iterator[list[str]]:
    """The texts of one column in batches of at most 8,192, nulls left out.

    ``preset`` names the published table that the files are; cc3m and cc12m have no header line of their own.

    Raises:
        BadInput: nothing at ``uri``, no table there, a column that is missing or holds no text, a damaged file.
    """
    for texts in read_texts(uri, column, preset):
        yield texts.drop_null().to_pylist()
