"""`coca evaluate caption/retrieve/classify`."""

import json
from pathlib import Path
from typing import Any, Literal

import click

from coca.errors import BadInput
from jobs.commands.options import coca_command

EXAMPLES = """\b
Examples:
  coca evaluate caption --checkpoint runs/first --data held_out.parquet
  coca evaluate retrieve --checkpoint runs/first --data held_out.parquet
  coca evaluate classify --checkpoint runs/first --data held_out.parquet --classes classes.json
"""

CHECKPOINT = click.option("--checkpoint", required=True, metavar="CKPT", help="Checkpoint or run folder.")
DATA = click.option(
    "--data",
    required=True,
    metavar="FILE",
    help="Parquet with `image` (bytes), `captions` (list), maybe `label`.",
)


@click.group(epilog=EXAMPLES)
def command() -> None:
    """Measure a checkpoint on held-out pictures."""


@command.command(epilog="Example: coca evaluate caption --checkpoint runs/first --data held_out.parquet")
@CHECKPOINT
@DATA
@click.option("--show", type=click.IntRange(min=0), default=8, show_default=True, help="Captions to print.")
@coca_command
def caption(checkpoint: str, data: str, show: int) -> dict[str, Any]:
    """Share of greedy captions that equal an accepted one, and perplexity."""
    from coca.checkpoint import load_checkpoint
    from coca.evaluate import evaluate_captions, perplexity, read_evaluation_set

    pictures, loaded = read_evaluation_set(data), load_checkpoint(checkpoint)
    result = evaluate_captions(loaded, pictures) | {"perplexity": perplexity(loaded, pictures)}
    for exact, written, accepted in list(zip(result["exact"], result["captions"], pictures.captions, strict=True))[
        :show
    ]:
        click.echo(f"{'exact ' if exact else 'differs'}  {written}" + ("" if exact else f"   (true: {accepted[0]})"))
    click.echo(
        f"exact {result['exact_caption']:.3f}, perplexity {result['perplexity']:.3f}, {result['pictures']} pictures"
    )
    return result


@command.command(epilog="Example: coca evaluate retrieve --checkpoint runs/first --data held_out.parquet")
@CHECKPOINT
@DATA
@coca_command
def retrieve(checkpoint: str, data: str) -> dict[str, Any]:
    """Recall at 1, 5 and 10, image to text and text to image, over the set as one pool."""
    from coca.checkpoint import load_checkpoint
    from coca.evaluate import evaluate_retrieval, read_evaluation_set

    pictures = read_evaluation_set(data)
    result = evaluate_retrieval(load_checkpoint(checkpoint), pictures)
    for direction in ("image_to_text", "text_to_image"):
        recalls = ", ".join(f"@{k} {result[f'{direction}_recall_at_{k}']:.3f}" for k in (1, 5, 10))
        click.echo(
            f"{direction.replace('_', ' ')}: recall {recalls} (chance @1 {result[f'chance_{direction}_at_1']:.3f})"
        )
    return result


@command.command(
    epilog='CLASSES is {"classes": ["cat", "dog"], "templates": ["a photo of a {}"]}. '
    "Example: coca evaluate classify --checkpoint runs/first --data held_out.parquet --classes classes.json"
)
@CHECKPOINT
@DATA
@click.option("--classes", "classes_file", required=True, type=click.Path(path_type=Path), help="JSON: see below.")
@click.option(
    "--by",
    type=click.Choice(["embedding", "likelihood"]),
    default="embedding",
    show_default=True,
    help="The nearest prompt, or the likeliest as a caption.",
)
@coca_command
def classify(checkpoint: str, data: str, classes_file: Path, by: Literal["embedding", "likelihood"]) -> dict[str, Any]:
    """Zero-shot accuracy on the column `label`, with prompts from templates."""
    from coca.checkpoint import load_checkpoint
    from coca.evaluate import evaluate_classification, read_evaluation_set

    pictures = read_evaluation_set(data)
    classes, templates = _read_classes(classes_file)
    result = evaluate_classification(load_checkpoint(checkpoint), pictures, classes, templates, by)
    click.echo(f"zero-shot accuracy {result['zero_shot_accuracy']:.3f} (chance {result['chance']:.3f})")
    return result


def _read_classes(path: Path) -> tuple[list[str], list[str]]:
    way_out = 'Write {"classes": [...], "templates": ["a photo of a {}", ...]}'
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot read the classes {path}: {error}", way_out) from None
    lists = [values.get(key) if isinstance(values, dict) else None for key in ("classes", "templates")]
    for key, found in zip(("classes", "templates"), lists, strict=True):
        if not isinstance(found, list) or not found or not all(isinstance(text, str) for text in found):
            raise BadInput(f"{path} has no list of strings {key!r}", way_out)
    return lists[0] or [], lists[1] or []
