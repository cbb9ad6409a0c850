"""``coca data select`` and ``coca data retokenize``: another version of what is stored, without a request."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from jobs.commands.options import coca_command, config_options
from jobs.commands.scorer_options import connect_for, scorer_options, scorer_specs


@click.command(
    epilog="""\b
Examples:
  coca data select data/mine --set select.min_words=4 --set 'select.languages=[en, de]'
  coca data select data/mine --set select.duplicates=perceptual
  coca data select s3://bucket/mine --scorer runs/first --scorer-gpus 1 --scorer-actors 8 \\
    --set 'select.min_scores={coca_similarity: 0.25}'
  coca data select data/mine --scorer mypackage.scorers:nsfw --set 'select.min_scores={safe: 0.5}'
  coca data select data/mine --set 'select.contaminants=[coco-test.sha256]'
"""
)
@click.argument("dataset")
@scorer_options
@config_options
@coca_command
def select(
    dataset: str,
    scorers: tuple[str, ...],
    scorer_actors: int,
    scorer_gpus: float,
    config_file: Path | None,
    sets: tuple[str, ...],
) -> dict[str, Any]:
    """Select among the stored pairs by other rules and publish a version.

    Rules that are not set stay as the latest version has them; null takes one away. No request is made and no sample
    is written. Rules looser than those of admission are refused.
    """
    from coca.dataset import Dataset
    from coca.typed_config import build_config, resolve_config
    from pipelines.select import select_dataset
    from pipelines.select_config import SelectConfig, SelectionConfig

    standing = build_config(SelectConfig, Dataset(dataset).record.config.get("select", {}))
    config = resolve_config(SelectionConfig(select=standing), config_file, sets).select
    specs = scorer_specs(scorers, scorer_actors, scorer_gpus)
    start_ray = connect_for(scorers, scorer_actors, scorer_gpus)
    result = select_dataset(dataset, config, scorers=specs, start_ray=start_ray)
    click.echo(_describe_selection(result))
    return asdict(result)


@click.command(
    epilog="""\b
Examples:
  coca data retokenize data/mine --tokenizer tokenizer.json
  coca data retokenize s3://bucket/mine --tokenizer s3://bucket/clip.json --json
"""
)
@click.argument("dataset")
@click.option("--tokenizer", required=True, metavar="FILE", help="A file that `coca tokenizer` wrote.")
@coca_command
def retokenize(dataset: str, tokenizer: str) -> dict[str, Any]:
    """Write the tokens of another tokenizer and publish a version; samples and verdicts stay as they are."""
    from coca.tokenizer import Tokenizer
    from jobs.cluster import connect
    from pipelines.retokenize import retokenize_dataset

    result = retokenize_dataset(dataset, Tokenizer.load(tokenizer), start_ray=connect)
    if result.changed:
        click.echo(
            f"{result.dataset}: version {result.version} has the tokens of {result.fingerprint}: "
            f"{result.tokens:,} over {result.stored:,} captions, {result.tokens_before:,} before"
        )
    else:
        click.echo(f"{result.dataset}: version {result.version} has the tokens of {result.fingerprint} already")
    return asdict(result)


def _describe_selection(result: Any) -> str:
    from pipelines.funnel import Funnel, render_funnel

    funnel = render_funnel(Funnel(links=result.stored, samples=result.selected, rejected=result.rejected))
    if not result.changed:
        return f"{funnel}\n\n{result.dataset}: version {result.version} was selected by these rules already"
    change = result.selected - result.selected_before
    return (
        f"{funnel}\n\n{result.dataset}: version {result.version} selects {result.selected:,} of {result.stored:,} "
        f"stored pairs ({change:+,}; {result.verdicts_changed:,} verdicts changed) in {result.seconds:,.1f} s"
    )
