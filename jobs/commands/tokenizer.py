"""``coca tokenizer``."""

from collections.abc import Iterator
from typing import Any

import click

from coca.errors import BadInput
from jobs.commands.options import coca_command


@click.group(no_args_is_help=False)
def command() -> None:
    """Train a tokenizer on captions."""


@command.command("train")
@click.option("--from", "source", required=True, metavar="URI", help="Links table: .parquet, .csv, .tsv, or a folder.")
@click.option("--out", required=True, metavar="FILE", help="Where the tokenizer goes, for example tokenizer.json.")
@click.option("--column", default="caption", show_default=True, help="Column of the captions.")
@click.option("--vocab-size", type=int, default=64_000, show_default=True, help="Most entries; 64,000 is the paper's.")
@coca_command
def train(source: str, out: str, column: str, vocab_size: int) -> dict[str, Any]:
    """Train a byte-level BPE tokenizer on the captions of a links table."""
    from coca.progress import Progress
    from coca.tokenizer import train_bpe
    from jobs.captions import read_column

    store, name = _output_file(out)
    with Progress("read", unit="captions") as progress:
        tokenizer = train_bpe(_counted(read_column(source, column), progress), vocab_size)
    if progress.count == 0:
        raise BadInput(f"column {column!r} of {source} holds no captions", "Give a table with at least one")
    store.write(name, tokenizer.to_json().encode())
    result = {
        "out": out,
        "captions": progress.count,
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": tokenizer.fingerprint,
    }
    click.echo(f"{out}: {tokenizer.vocab_size:,} entries from {progress.count:,} captions ({tokenizer.fingerprint})")
    click.echo(f"next: coca data refresh --links {source} --tokenizer {out} --to DATASET")
    return result


def _output_file(out: str) -> tuple[Any, str]:
    """What would stop the write at the end, known before the captions are read."""
    from coca.storage import open_file

    store, name = open_file(out)
    store.check_folder("--out")
    if store.is_folder(name):
        raise BadInput(f"--out {out} is a folder", f"Name a file in it: {out.rstrip('/')}/tokenizer.json")
    return store, name


def _counted(batches: Iterator[list[str]], progress: Any) -> Iterator[str]:
    for batch in batches:
        yield from batch
        progress.advance(len(batch))
