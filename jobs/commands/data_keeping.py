"""``coca data``: keeping a dataset: its history, checking and shrinking it, withdrawing pictures from it."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from jobs.commands.options import EXIT_FAILED, Outcome, coca_command

# Faults in the JSON result; all of them are printed.
_MOST_FAULTS = 1000


@click.command(
    epilog="""\b
Examples:
  coca data history data/mine
  coca data history s3://bucket/mine --json
"""
)
@click.argument("dataset")
@coca_command
def history(dataset: str) -> dict[str, Any]:
    """The versions of a dataset, a line each."""
    from pipelines.history import history as read_history

    lines = read_history(dataset)
    click.echo("version  kind        when                       parent     selected                 stored   withdrawn")
    for line in lines:
        selected = f"{line.selected:,}{_change(line.selected_change)}"
        stored = f"{line.stored:,}{_change(line.stored_change)}"
        parent = "-" if line.parent is None else str(line.parent)
        pinned = "  pinned" if line.pinned else ""
        click.echo(
            f"{line.version:>7}  {line.kind:<10}  {line.created_at:<25}  {parent:>6}  {selected:>21}  {stored:>21}"
            f"  {line.withdrawn:>10,}{pinned}"
        )
    return {"dataset": dataset, "versions": [asdict(line) for line in lines]}


@click.command(
    epilog="""\b
Examples:
  coca data diff data/mine 3 4
"""
)
@click.argument("dataset")
@click.argument("before", type=int)
@click.argument("after", type=int)
@coca_command
def diff(dataset: str, before: int, after: int) -> dict[str, Any]:
    """What changed from one version to another: samples, selection, links, tokenizer, settings."""
    from pipelines.diff import diff as compare

    found = vars(compare(dataset, before, after))
    for title in ("added", "removed", "newly_selected", "unselected", "links"):
        counts = found[title]
        click.echo(f"{title.replace('_', ' ')}: {sum(counts.values()):,}")
        for name, count in counts.most_common():
            click.echo(f"  {count:>12,}  {name}")
    click.echo(f"retokenized: {found['retokenized']:,}")
    if found["tokenizer"]:
        click.echo(f"tokenizer: {found['tokenizer'][0]} -> {found['tokenizer'][1]}")
    for name, (old, new) in found["config"].items():
        click.echo(f"{name}: {old!r} -> {new!r}")
    return found


@click.command(
    epilog="""\b
Examples:
  coca data rollback data/mine --to 3
"""
)
@click.argument("dataset")
@click.option("--to", type=int, required=True, metavar="VERSION", help="The version whose rows are wanted back.")
@coca_command
def rollback(dataset: str, to: int) -> dict[str, Any]:
    """Publish a new version with exactly the rows of an older one; what was withdrawn stays withdrawn."""
    from pipelines.history import rollback as roll_back

    record = roll_back(dataset, to)
    click.echo(
        f"{dataset}: published version {record.version} with the rows of version {to}: {record.selected:,} samples"
    )
    return {"dataset": dataset, "version": record.version, "to": to, "samples": record.selected}


@click.command(
    epilog="""\b
Examples:
  coca data verify data/mine
  coca data verify s3://bucket/mine --version 7
"""
)
@click.argument("dataset")
@click.option("--version", type=int, help="By default all.")
@coca_command
def verify(dataset: str, version: int | None) -> Outcome:
    """Read every file and check every digest, key and count; names each fault and exits 1 where there are any."""
    from pipelines.verify import verify as check

    faults: list[str] = []

    def report(fault: object) -> None:
        click.echo(f"fault: {fault}")
        if len(faults) < _MOST_FAULTS:
            faults.append(str(fault))

    result = check(dataset, version, report=report)
    click.echo(
        f"{result.dataset}: {len(result.versions):,} versions, {result.files:,} files, {result.samples:,} samples, "
        f"{result.bytes / 1e6:,.1f} MB of images, {result.withdrawn:,} withdrawn: {result.faults:,} faults"
    )
    return Outcome({**asdict(result), "first_faults": faults}, EXIT_FAILED if result.faults else 0)


@click.command(
    epilog="""\b
Examples:
  coca data compact data/mine
  coca data compact data/mine --min-files 8
"""
)
@click.argument("dataset")
@click.option(
    "--min-files", type=click.IntRange(min=2), default=2, show_default=True, help="Only buckets with so many files."
)
@coca_command
def compact(dataset: str, min_files: int) -> dict[str, Any]:
    """Merge the small files of the ledger, a bucket at a time, and publish a version; no event is lost."""
    from pipelines.compact import compact as merge

    result = merge(dataset, min_files=min_files)
    if result.buckets:
        click.echo(
            f"{result.dataset}: published version {result.version}; {result.files_before:,} ledger files are now "
            f"{result.files_after:,}, {result.bytes_before / 1e6:,.1f} MB are {result.bytes_after / 1e6:,.1f} MB. "
            "`coca data vacuum` deletes the old ones when no version needs them"
        )
    else:
        click.echo(f"{result.dataset}: no bucket has {min_files} files; version {result.version} stands")
    return asdict(result)


@click.command(
    epilog="""\b
Examples:
  coca data vacuum data/mine --dry-run
  coca data vacuum data/mine --keep 3 --pin 12
  coca data vacuum data/mine --unpin 12
"""
)
@click.argument("dataset")
@click.option("--keep", type=int, default=10, show_default=True, metavar="N", help="The last N versions stay.")
@click.option("--pin", type=int, multiple=True, metavar="VERSION", help="A version that stays until it is unpinned.")
@click.option("--unpin", type=int, multiple=True, metavar="VERSION", help="Take a pin away.")
@click.option(
    "--staging-days",
    type=click.FloatRange(min=0),
    default=7.0,
    show_default=True,
    help="How long the state of a refresh that was killed stays: it can go on from it.",
)
@click.option("--dry-run", is_flag=True, help="List what would be deleted.")
@coca_command
def vacuum(
    dataset: str, keep: int, pin: tuple[int, ...], unpin: tuple[int, ...], staging_days: float, dry_run: bool
) -> dict[str, Any]:
    """Delete old versions, and the files that no version kept needs."""
    from pipelines.vacuum import vacuum as sweep

    result = sweep(dataset, keep=keep, pin=pin, unpin=unpin, staging_days=staging_days, dry_run=dry_run)
    for path in result.files if dry_run else ():
        click.echo(f"would delete {path}")
    done = "would drop" if dry_run else "dropped"
    pinned = f" (pinned: {', '.join(map(str, result.pinned))})" if result.pinned else ""
    click.echo(
        f"{result.dataset}: {done} {len(result.dropped):,} versions and {len(result.files):,} files, "
        f"{result.bytes / 1e6:,.1f} MB; {len(result.kept):,} versions are kept{pinned}"
    )
    return asdict(result)


@click.command(
    epilog="""\b
Examples:
  coca data purge data/mine
"""
)
@click.argument("dataset")
@coca_command
def purge(dataset: str) -> dict[str, Any]:
    """Overwrite the bytes of withdrawn pictures with zeros, in every file that has them."""
    from pipelines.purge import purge as overwrite

    result = overwrite(dataset)
    click.echo(
        f"{result.dataset}: overwrote {result.samples:,} pictures, {result.bytes / 1e6:,.1f} MB, in {result.files:,} "
        f"files; {result.purged_before:,} had been overwritten before"
    )
    return asdict(result)


@click.command(
    epilog="""\b
Examples:
  coca data withdraw data/mine --url https://example.com/me.jpg --reason takedown
  coca data withdraw s3://bucket/mine --from takedowns.txt --reason takedown
"""
)
@click.argument("dataset")
@click.option("--url", "urls", multiple=True, help="An url; may be repeated.")
@click.option("--sha256", multiple=True, metavar="HEX", help="SHA-256 of a picture's file as it was fetched.")
@click.option("--sample-id", "sample_ids", multiple=True, metavar="HEX", help="A sample.")
@click.option(
    "--from",
    "file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="One url, SHA-256 or sample id a line; # begins a comment line.",
)
@click.option("--reason", required=True, metavar="TEXT", help="Why; it stays on the list.")
@coca_command
def withdraw(
    dataset: str,
    urls: tuple[str, ...],
    sha256: tuple[str, ...],
    sample_ids: tuple[str, ...],
    file: Path | None,
    reason: str,
) -> dict[str, Any]:
    """Take pictures out of every version for good, with every stored copy of them.

    Readers leave them out from the next time they open the dataset; `coca data purge` removes the bytes.
    """
    from pipelines.withdraw import read_targets
    from pipelines.withdraw import withdraw as take_out

    listed = read_targets(file) if file else {}
    result = take_out(
        dataset,
        urls=[*urls, *listed.get("urls", [])],
        source_sha256=[*sha256, *listed.get("source_sha256", [])],
        sample_ids=[*sample_ids, *listed.get("sample_ids", [])],
        reason=reason,
    )
    click.echo(
        f"{result.dataset}: withdrew {result.samples:,} samples of {result.pictures:,} pictures; {result.refused:,} "
        f"entries that nothing is stored of are refused from now on; {result.withdrawn:,} samples are on the list. "
        "Remove the bytes: coca data purge"
    )
    return asdict(result)


def _change(amount: int | None) -> str:
    return f" ({amount:+,})" if amount else ""
