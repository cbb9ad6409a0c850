"""Bytes that wait on disk: read back exactly, and gone with the process."""

import os

import pytest

from pipelines.spool import Spool, Spooled


def test_what_is_added_is_read_back_in_any_order() -> None:
    bodies = [bytes([number]) * (number * 37) for number in range(50)]
    with Spool() as spool:
        places = [spool.add(body) for body in bodies]
        assert places[2] == Spooled(37, 74)
        assert [spool.read(place) for place in reversed(places)] == bodies[::-1]


def test_it_has_no_name_and_is_closed() -> None:
    with Spool() as spool:
        spool.add(b"abc")
        descriptor = spool._file.fileno()
        assert os.fstat(descriptor).st_nlink == 0
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
