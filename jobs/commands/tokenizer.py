"""``coca tokenizer``."""

import hashlib
from collections.abc import Iterator
from typing import Any

import click

from coca.errors import BadInput
from jobs.commands.options import coca_command


@click.group(no_args_is_help=False)
def command() -> None:
    """Train a tokenizer on captions, or take CLIP's."""


@command.command(
    epilog="""\b
Examples:
  coca tokenizer train --from links.parquet --out tokenizer.json
  coca tokenizer train --from s3://bucket/links --column TEXT --model unigram --sample 0.1 --out tokenizer.json
"""
)
@click.option("--from", "source", required=True, metavar="URI", help="Links table: a file, a folder or a pattern.")
@click.option("--out", required=True, metavar="FILE", help="Where the tokenizer goes, for example tokenizer.json.")
@click.option("--column", metavar="NAME", help="Column of the captions; by default that of --columns, or caption.")
@click.option(
    "--columns",
    type=click.Choice(["laion", "datacomp", "coyo", "cc3m", "cc12m"]),
    help="The published tables whose column names are meant.",
)
@click.option("--vocab-size", type=int, default=64_000, show_default=True, help="Most entries; 64,000 is the paper's.")
@click.option("--model", type=click.Choice(["bpe", "unigram"]), default="bpe", show_default=True, help="Kind of model.")
@click.option(
    "--sample",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Share of the captions to learn from, chosen by their hash.",
)
@coca_command
def train(
    source: str, out: str, column: str | None, columns: Any, vocab_size: int, model: str, sample: float
) -> dict[str, Any]:
    """Train a byte-level tokenizer on the captions of a links table, streamed: memory grows with different words."""
    from coca.progress import Progress
    from coca.tokenizer import train_bpe, train_unigram
    from jobs.captions import read_column
    from pipelines.column_presets import PRESETS

    columns = columns or ""
    column = column or PRESETS[columns].caption
    store, name = _output_file(out)
    with Progress("read", unit="captions") as progress:
        captions = _counted(read_column(source, column, columns), progress, sample)
        try:
            tokenizer = {"bpe": train_bpe, "unigram": train_unigram}[model](captions, vocab_size)
        except NoCaptions:
            larger = " or a larger --sample" if sample < 1 else ""
            raise BadInput(
                f"column {column!r} of {source} holds no captions", f"Give a table with at least one{larger}"
            ) from None
    store.write(name, tokenizer.to_json().encode())
    result = {
        "out": out,
        "model": model,
        "captions": progress.count,
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": tokenizer.fingerprint,
    }
    click.echo(f"{out}: {tokenizer.vocab_size:,} entries from {progress.count:,} captions ({tokenizer.fingerprint})")
    named = f" --columns {columns}" if columns else ""
    click.echo(f"next: coca data refresh --links {source}{named} --tokenizer {out} --to DATASET")
    return result


@command.command(
    epilog="""\b
Examples:
  coca tokenizer clip bpe_simple_vocab_16e6.txt.gz --out clip.json
  coca data retokenize data/mine --tokenizer clip.json
"""
)
@click.argument("vocabulary", metavar="VOCAB")
@click.option("--out", required=True, metavar="FILE", help="Where the tokenizer goes, for example clip.json.")
@coca_command
def clip(vocabulary: str, out: str) -> dict[str, Any]:
    """CLIP's tokenizer from OpenAI's vocabulary file, bpe_simple_vocab_16e6.txt.gz."""
    from coca.tokenizer import clip_tokenizer

    store, name = _output_file(out)
    tokenizer = clip_tokenizer(vocabulary)
    store.write(name, tokenizer.to_json().encode())
    click.echo(f"{out}: CLIP's {tokenizer.vocab_size:,} entries ({tokenizer.fingerprint})")
    return {"out": out, "vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint}


class NoCaptions(Exception):
    """There is nothing to learn from."""


def _output_file(out: str) -> tuple[Any, str]:
    """What would stop the write at the end, known before the captions are read."""
    from coca.storage import open_file

    store, name = open_file(out)
    store.check_folder("--out")
    if store.is_folder(name):
        raise BadInput(f"--out {out} is a folder", f"Name a file in it: {out.rstrip('/')}/tokenizer.json")
    return store, name


def _counted(batches: Iterator[list[str]], progress: Any, share: float) -> Iterator[str]:
    """The captions of a sample, counted.

    Raises:
        NoCaptions: there is none, at the end.
    """
    for batch in batches:
        chosen = batch if share >= 1 else [caption for caption in batch if _place(caption) < share]
        yield from chosen
        progress.advance(len(chosen))
    if progress.count == 0:
        raise NoCaptions


def _place(caption: str) -> float:
    """Where a caption lies between 0 and 1: the same in every order of rows."""
    digest = hashlib.blake2b(caption.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
