"""`coca weights inspect`; import and export: test_weights.py."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from coca.checkpoint import save_checkpoint
from coca.config import ModelConfig, Preprocessing
from coca.model import CoCa
from coca.storage import Store
from jobs.cli import cli


def weights(*words: object) -> Result:
    return CliRunner().invoke(cli, ["weights", *map(str, words)])


def succeeded(*words: object) -> dict[str, Any]:
    result = weights(*words, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def test_inspect_counts_a_variant() -> None:
    result = succeeded("inspect", "--variant", "base", "--batch-size", "2", "--batch-size", "4", "--tokens", "32")
    assert result["parameters"]["total"] == 386_576_641
    assert result["paper_parameters"] == {"encoder": 85_999_872, "text": 296_832_768, "total": 382_832_640}
    assert result["training_flops"]["total"] == 3 * result["forward_flops"]["total"]
    assert result["forward_flops"]["total"] / 1e9 == pytest.approx(70.4, rel=0.01)
    memories = result["memory"]
    assert [row["batch_size"] for row in memories] == [2] * 4 + [4] * 4
    assert [row["precision"] for row in memories[::2]] == ["bfloat16", "float32"] * 2
    for kept, recomputed in zip(memories[::2], memories[1::2], strict=True):
        assert (kept["checkpointing"], recomputed["checkpointing"]) == (False, True)
        assert recomputed["activations"] < kept["activations"] / 3
        assert kept["weights"] == 4 * 386_576_641


def test_inspect_prints_tables_whose_columns_align() -> None:
    result = weights("inspect", "--variant", "coca_ViT-B-32")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert any(line.split()[:2] == ["total", "253,560,065"] for line in lines)
    blocks = result.stdout.strip().split("\n\n")
    costs, sizes = blocks[1].splitlines(), blocks[4].splitlines()
    assert len(costs) == 10
    assert [row.split()[0] for row in sizes] == ["batch", "1", "1", "64", "64", "256", "256", "1,024", "1,024"]
    for table in (costs, sizes):
        full = [len(row) for row in table if row.endswith(("FLOPs", "iB", "total", "training"))]
        assert len(set(full)) == 1, "numbers end in one column"


def test_inspect_does_not_read_the_weights(tmp_path: Path, tiny_model: ModelConfig) -> None:
    model = CoCa(tiny_model)
    parts = {"model": model, "tokenizer": None, "preprocessing": Preprocessing(image_size=16)}
    save_checkpoint(Store(tmp_path), "ours", **parts, step=3, provenance={"seed": 7})
    (tmp_path / "ours" / "model.safetensors").unlink()
    result = succeeded("inspect", tmp_path / "ours")
    assert result["parameters"]["total"] == sum(parameter.numel() for parameter in model.parameters())
    assert (result["step"], result["provenance"]) == (3, {"seed": 7})


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "neither a checkpoint nor --variant given. Give one"),
        (["here", "--variant", "base"], "both a checkpoint and --variant given. Give one"),
        (["--variant", "huge"], "there is no variant 'huge'. Known are base, large"),
        (["none"], "none is not a checkpoint"),
        (["--variant", "base", "--tokens", "65"], "captions of 65 tokens: the model takes 2 to 64"),
        (["--variant", "base", "--tokens", "0"], "captions of 0 tokens"),
        (["--variant", "base", "--batch-size", "0"], "Invalid value for '--batch-size'"),
    ],
)
def test_inspect_says_what_is_wrong(words: list[str], expected: str) -> None:
    result = weights("inspect", *words)
    assert result.exit_code == 2, result.output
    assert len(result.stderr.splitlines()) == 1
    assert expected in result.stderr
