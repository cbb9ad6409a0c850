"""What the lists that settings name hold: a list that is edited makes another refresh of the same settings."""

import hashlib

from coca.errors import BadInput
from coca.storage import open_file
from pipelines.config import RefreshConfig


def digest_lists(config: RefreshConfig) -> dict[str, str]:
    """SHA-256 of each file of words, domains, urls or hashes, by its uri.

    Raises:
        BadInput: one cannot be read.
    """
    judge = config.judge
    named = (
        judge.blocked_words,
        judge.block_domains,
        judge.block_urls,
        judge.block_hashes,
        *config.select.contaminants,
    )
    return {uri: _digest(uri) for uri in named if uri}


def _digest(uri: str) -> str:
    store, name = open_file(uri)
    try:
        return hashlib.sha256(store.read(name)).hexdigest()
    except OSError as error:
        raise BadInput(f"cannot read the list {uri}: {error}", "Give a file that is there") from None
