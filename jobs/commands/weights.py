"""``coca weights import/export/inspect``."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coca.errors import BadInput
from jobs.commands.options import coca_command

if TYPE_CHECKING:
    from coca.config import ModelConfig

EXAMPLES = """\b
Examples:
  coca weights import open_clip open_clip_model.safetensors --config open_clip_config.json --out models/coca
  coca weights export open_clip models/coca --out coca.safetensors
  coca weights inspect --variant large
"""
IMPORT_EXAMPLES = """\b
Examples:
  coca weights import open_clip open_clip_model.safetensors --config open_clip_config.json --out models/coca \\
    --tokenizer bpe_simple_vocab_16e6.txt.gz
  coca weights import open_clip s3://bucket/epoch_97.pt --config coca_ViT-B-32.json --out s3://bucket/models/coca
"""
INSPECT_EXAMPLES = """\b
Examples:
  coca weights inspect runs/first
  coca weights inspect --variant coca_ViT-L-14 --batch-size 256 --batch-size 512
  coca weights inspect --variant base --tokens 32 --json
"""
BATCH_SIZES = (1, 64, 256, 1024)
LAYOUT = click.argument("layout", type=click.Choice(["open_clip"]), metavar="open_clip")


@click.group(epilog=EXAMPLES)
def command() -> None:
    """Take weights over from open_clip and give them back; see what a model costs."""


@command.command("import", epilog=IMPORT_EXAMPLES)
@LAYOUT
@click.argument("file")
@click.option("--config", "config_file", required=True, metavar="JSON", help="open_clip's JSON of the model.")
@click.option("--out", required=True, metavar="CKPT", help="Folder of the checkpoint, new or empty.")
@click.option(
    "--tokenizer",
    "tokenizer_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="CLIP's bpe_simple_vocab_16e6.txt.gz, or a tokenizer.json.",
)
@click.option("--begin-id", type=int, help="Token that every caption begins with. Default: the JSON's, else CLIP's.")
@click.option("--end-id", type=int, help="Token that every caption ends with.")
@click.option("--pad-id", type=int, help="Token that fills short captions.")
@coca_command
def import_(
    layout: str,
    file: str,
    config_file: str,
    out: str,
    tokenizer_file: Path | None,
    begin_id: int | None,
    end_id: int | None,
    pad_id: int | None,
) -> dict[str, Any]:
    """Make a checkpoint of FILE, safetensors or a torch state dict, local or s3://. Nothing in it is run.

    JSON is open_clip's model config, alone or as published with the weights (`open_clip_config.json`).
    """
    from jobs.weights import import_open_clip

    ids = {"begin_id": begin_id, "end_id": end_id, "pad_id": pad_id}
    given = {name: value for name, value in ids.items() if value is not None}
    result = import_open_clip(file, config_file, out, tokenizer_file=tokenizer_file, ids=given)
    known = f", the variant {result['variant']}" if result["variant"] else ""
    click.echo(f"{out}: {result['parameters']:,} parameters in {' and '.join(result['dtypes'])}{known}")
    click.echo(_architecture(result["model"]))
    click.echo(f"next: coca weights inspect {out}")
    if result["tokenizer"] is None:
        click.echo("No tokenizer: the checkpoint cannot caption or embed text; import again with --tokenizer FILE")
    else:
        click.echo(f"      coca evaluate retrieve --checkpoint {out} --data FILE")
        click.echo(f"      coca serve --checkpoint {out}")
    return result


def _architecture(model: dict[str, Any]) -> str:
    vision, text = model["vision"], model["text"]
    return (
        f"ViT of {vision['layers']} blocks, width {vision['width']}, {vision['image_size']} pixels; "
        f"text of {text['unimodal_layers']} + {text['multimodal_layers']} blocks, width {text['width']}, "
        f"{text['vocab_size']:,} entries, {text['context_length']} tokens"
    )


@command.command(epilog="Example: coca weights export open_clip models/coca --out coca.safetensors")
@LAYOUT
@click.argument("checkpoint", metavar="CKPT")
@click.option("--out", required=True, metavar="FILE", help="The new file, .safetensors; the model's JSON goes beside.")
@coca_command
def export(layout: str, checkpoint: str, out: str) -> dict[str, Any]:
    """Write the weights of CKPT, a checkpoint or run folder, as open_clip reads them.

    Weights that were imported come back with the same names, shapes, precision and bits.
    """
    from jobs.weights import export_open_clip

    result = export_open_clip(checkpoint, out)
    click.echo(f"{out}: {result['tensors']} tensors, {result['parameters']:,} parameters")
    if result["config"]:
        click.echo(f"{result['config']}: the model's config")
    return result


@command.command(epilog=INSPECT_EXAMPLES)
@click.argument("checkpoint", required=False, metavar="[CKPT]")
@click.option("--variant", "variant_name", metavar="NAME", help="A named architecture instead of a checkpoint.")
@click.option("--tokens", type=int, metavar="T", help="Length of the captions. Default: the model's context.")
@click.option(
    "--batch-size",
    "batch_sizes",
    type=click.IntRange(min=1),
    multiple=True,
    default=BATCH_SIZES,
    show_default=True,
    metavar="N",
    help="Samples of one device in a training step; may be repeated.",
)
@coca_command
def inspect(
    checkpoint: str | None, variant_name: str | None, tokens: int | None, batch_sizes: tuple[int, ...]
) -> dict[str, Any]:
    """Parameters, FLOPs per sample and memory of a training step, counted without allocating the model.

    Memory is that of AdamW in float32 without torch.compile, with bfloat16 or float32 products, with and without
    train.activation_checkpointing; work space of single operations comes on top.
    """
    described = _described(checkpoint, variant_name)
    config = described.pop("config")
    result = {**described, **_counts(config, tokens), "memory": _memories(config, batch_sizes, tokens)}
    click.echo(
        f"{result['name']}: pictures of {config.vision.image_size} pixels, captions of {result['tokens']} tokens\n"
    )
    _echo_table(_cost_rows(result))
    encoder, text, total = (f"{count:,}" for count in result["paper_parameters"].values())
    click.echo(f"\nWithout poolers and projections, as the paper counts: encoder {encoder} + text {text} = {total}\n")
    _echo_memory(result["memory"])
    return result


def _described(checkpoint: str | None, variant_name: str | None) -> dict[str, Any]:
    if (checkpoint is None) == (variant_name is None):
        both = "both a checkpoint and --variant" if checkpoint else "neither a checkpoint nor --variant"
        raise BadInput(f"{both} given", "Give one: coca weights inspect CKPT, or --variant NAME")
    if variant_name is not None:
        from coca.variants import variant

        return {"name": variant_name, "config": variant(variant_name)}
    from coca.checkpoint import read_description

    assert checkpoint is not None
    found = read_description(checkpoint)
    return {"name": checkpoint, "config": found.model, "step": found.step, "provenance": found.provenance}


def _counts(config: "ModelConfig", tokens: int | None) -> dict[str, Any]:
    from coca.cost import ENCODER, TEXT, TRAINING, flops, parameters

    counts, forward = parameters(config), flops(config, tokens)
    encoder, text = counts[ENCODER], sum(counts[part] for part in TEXT)
    return {
        "model": config.model_dump(mode="json"),
        "tokens": tokens or config.text.context_length,
        "parameters": {**counts, "total": sum(counts.values())},
        "paper_parameters": {"encoder": encoder, "text": text, "total": encoder + text},
        "forward_flops": {**forward, "total": sum(forward.values())},
        "training_flops": {**_times(forward, TRAINING), "total": TRAINING * sum(forward.values())},
    }


def _times(values: dict[str, int], factor: int) -> dict[str, int]:
    return {name: factor * value for name, value in values.items()}


def _memories(config: "ModelConfig", batch_sizes: tuple[int, ...], tokens: int | None) -> list[dict[str, Any]]:
    from coca.memory import PRECISIONS, memory

    rows = []
    for batch_size in batch_sizes:
        for precision in PRECISIONS:
            for checkpointing in (False, True):
                needed = memory(config, batch_size, precision, checkpointing=checkpointing, tokens=tokens)
                settings = {"batch_size": batch_size, "precision": precision, "checkpointing": checkpointing}
                rows.append({**settings, **needed._asdict(), "total": needed.total})
    return rows


def _cost_rows(result: dict[str, Any]) -> list[list[str]]:
    rows = [["", "parameters", "forward", "training"]]
    for part, count in result["parameters"].items():
        operations = [result[key][part] for key in ("forward_flops", "training_flops")]
        rows.append([part, f"{count:,}", *map(_operations, operations)])
    return rows


def _echo_memory(memories: list[dict[str, Any]]) -> None:
    first = memories[0]
    state = ", ".join(f"{name} {_size(first[name])}" for name in ("weights", "gradients", "optimizer"))
    copies = max(row["weight_copies"] for row in memories)
    click.echo(f"Memory of a training step: {state};\nwith bfloat16 {_size(copies)} of copies of the weights\n")
    rows = [["batch size", "precision", "activations", "total", "checkpointed", "total"]]
    for kept, recomputed in zip(memories[::2], memories[1::2], strict=True):
        sizes = [_size(row[key]) for row in (kept, recomputed) for key in ("activations", "total")]
        rows.append([f"{kept['batch_size']:,}", kept["precision"], *sizes])
    _echo_table(rows)


def _operations(count: int) -> str:
    if not count:
        return ""
    return f"{count / 1e9:,.3f} GFLOPs" if count >= 1e8 else f"{count / 1e6:,.3f} MFLOPs"


def _size(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def _echo_table(rows: list[list[str]]) -> None:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        click.echo("  ".join(cells).rstrip())
