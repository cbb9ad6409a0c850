"""Hash lists of evaluation pictures, which are kept out of what a model is trained on."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from coca.errors import BadInput
from coca.storage import open_file
from pipelines.duplicates import is_blank, near_any, signed_hashes

_HASH = re.compile(r"[0-9a-f]{64}|[0-9a-f]{16}")


@dataclass(frozen=True)
class Contaminants:
    """What must not be selected."""

    digests: pa.Array
    """SHA-256 of picture files, lower-case hex."""
    phashes: np.ndarray
    """Perceptual hashes (uint64) of pictures with detail: a blank one is near every blank picture of the web."""
    max_hamming: int

    def mask(self, source_sha256: pa.ChunkedArray, phash: pa.ChunkedArray) -> np.ndarray:
        """Which pictures are on a list: by digest, or with a perceptual hash within ``max_hamming`` bits."""
        equal = pc.is_in(source_sha256, value_set=self.digests).to_numpy()
        return np.asarray(equal | near_any(signed_hashes(phash), self.phashes, self.max_hamming))


def read_contaminants(uris: Iterable[str], max_hamming: int) -> Contaminants | None:
    """The hashes of all lists; None where no list is given. Empty lines and what follows a # are passed over.

    Raises:
        BadInput: a list that cannot be read, a line that is no hash, or a list without any.
    """
    digests: set[str] = set()
    phashes: set[int] = set()
    uris = list(uris)
    for uri in uris:
        hashes = _read_list(uri)
        digests.update(each for each in hashes if len(each) == 64)
        phashes.update(int(each, 16) for each in hashes if len(each) == 16)
    if not uris:
        return None
    numbers = np.array(sorted(phashes), dtype=np.uint64)
    return Contaminants(pa.array(sorted(digests), pa.string()), numbers[~is_blank(numbers)], max_hamming)


def _read_list(uri: str) -> list[str]:
    way_out = "Give a text file with a hash a line: 64 hex digits (SHA-256 of the file) or 16 (perceptual hash)"
    store, name = open_file(uri)
    try:
        text = store.read(name).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read the hash list {uri}: {error}", way_out) from None
    hashes = []
    for number, line in enumerate(text.splitlines(), start=1):
        entry = line.partition("#")[0].strip().lower()
        if not entry:
            continue
        if not _HASH.fullmatch(entry):
            raise BadInput(f"{uri} line {number}: {entry[:80]!r} is no hash", way_out)
        hashes.append(entry)
    if not hashes:
        raise BadInput(f"the hash list {uri} holds no hash", way_out)
    return hashes
