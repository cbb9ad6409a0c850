"""Checkpoints: whole or refused."""

import hashlib
import json
import random
from pathlib import Path

import pytest
import torch

from coca.checkpoint import (
    checkpoint_path,
    list_checkpoints,
    load_checkpoint,
    load_model,
    save_checkpoint,
)
from coca.config import ModelConfig, Preprocessing
from coca.errors import BadInput
from coca.model import CoCa
from coca.storage import Store
from coca.tokenizer import Tokenizer


@pytest.fixture
def saved(tmp_path: Path, tiny_model: ModelConfig, tokenizer: Tokenizer) -> tuple[Path, CoCa]:
    torch.manual_seed(0)
    model = CoCa(tiny_model)
    save(Store(tmp_path), checkpoint_path(7), model, tokenizer)
    return tmp_path / checkpoint_path(7), model


def save(store: Store, path: str, model: CoCa, tokenizer: Tokenizer) -> None:
    save_checkpoint(
        store,
        path,
        model=model,
        tokenizer=tokenizer,
        preprocessing=Preprocessing(image_size=16, mean=(0.1, 0.2, 0.3)),
        step=7,
        provenance={"dataset": "here"},
    )


def test_round_trip(saved: tuple[Path, CoCa], tokenizer: Tokenizer) -> None:
    folder, model = saved
    loaded = load_checkpoint(str(folder))
    assert all(torch.equal(a, b) for a, b in zip(loaded.model.parameters(), model.parameters(), strict=True))
    assert (loaded.step, loaded.provenance, loaded.model.training) == (7, {"dataset": "here"}, False)
    assert loaded.preprocessing.mean == (0.1, 0.2, 0.3)
    assert loaded.tokenizer.fingerprint == tokenizer.fingerprint


def test_s3_round_trip(s3: str, tiny_model: ModelConfig, tokenizer: Tokenizer) -> None:
    model = CoCa(tiny_model)
    save(Store(s3), "ckpt", model, tokenizer)
    assert torch.equal(load_model(f"{s3}/ckpt").log_logit_scale, model.log_logit_scale)


def test_a_run_folder_gives_its_newest_checkpoint(saved: tuple[Path, CoCa], tokenizer: Tokenizer) -> None:
    run = saved[0].parent.parent
    save(Store(run), checkpoint_path(10), saved[1], tokenizer)
    (run / checkpoint_path(12)).mkdir()  # a save that was cut off: no manifest
    (run / "checkpoints/step_best").mkdir()  # somebody's own
    (run / "checkpoints/step_best/manifest.json").write_text("{}")
    assert list_checkpoints(Store(run)) == [7, 10]
    assert load_checkpoint(str(run)).uri == str(run / checkpoint_path(10))


@pytest.mark.parametrize("seed", range(12))
def test_any_damage_is_seen(saved: tuple[Path, CoCa], seed: int) -> None:
    rng = random.Random(seed)
    victim = rng.choice(["model.safetensors", "config.json", "tokenizer.json", "preprocessing.json"])
    path = saved[0] / victim
    data = bytearray(path.read_bytes())
    match seed % 3:
        case 0:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
        case 1:
            path.write_bytes(data[: rng.randrange(len(data))])
        case 2:
            path.unlink()
    with pytest.raises(BadInput, match=victim):
        load_checkpoint(str(saved[0]))


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"is not a checkpoint: it holds no manifest.json"):
        load_checkpoint(str(tmp_path))


def replace(folder: Path, name: str, data: bytes) -> None:
    """A file of the checkpoint changed, with a manifest that agrees."""
    (folder / name).write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_weights_that_do_not_fit_are_named(saved: tuple[Path, CoCa]) -> None:
    """Key and shape of every mismatch, with digests that are right."""
    config = json.loads((saved[0] / "config.json").read_text())
    config["model"]["embed_dim"] = 4
    replace(saved[0], "config.json", json.dumps(config).encode())
    with pytest.raises(BadInput, match=r"image_projection.weight has shape \(8, 16\), not \(4, 16\)"):
        load_checkpoint(str(saved[0]))


def test_a_config_beyond_all_memory_is_refused_by_its_shapes(saved: tuple[Path, CoCa]) -> None:
    config = json.loads((saved[0] / "config.json").read_text())
    config["model"]["text"]["vocab_size"] = 10**14
    replace(saved[0], "config.json", json.dumps(config).encode())
    with pytest.raises(BadInput, match=r"token_embedding.weight has shape \(320, 16\), not \(100000000000000, 16\)"):
        load_checkpoint(str(saved[0]))


@pytest.mark.parametrize(
    "entries",
    [None, 5, [], "model.safetensors", {}]
    + [{"model.safetensors": entry} for entry in (None, 7, "x", [1, 2], {}, {"bytes": "many", "sha256": 3})],
)
def test_a_hostile_manifest_is_refused(saved: tuple[Path, CoCa], entries: object) -> None:
    (saved[0] / "manifest.json").write_text(json.dumps({"files": entries}))
    with pytest.raises(BadInput, match=r"model\.safetensors"):
        load_checkpoint(str(saved[0]))


@pytest.mark.parametrize(
    "text", ["", "no json", "[]", "3", "null", "[" * 100_000, "9" * 5000, b"\xff".decode("latin-1")]
)
@pytest.mark.parametrize("name", ["manifest.json", "config.json", "preprocessing.json", "tokenizer.json"])
def test_files_that_are_no_json_objects_are_refused(saved: tuple[Path, CoCa], name: str, text: str) -> None:
    if name == "manifest.json":
        (saved[0] / name).write_bytes(text.encode("latin-1"))
    else:
        replace(saved[0], name, text.encode("latin-1"))
    with pytest.raises(BadInput, match=name):
        load_checkpoint(str(saved[0]))


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("config.json", {"model": None}, "'model'"),
        ("config.json", {"model": []}, "'model'"),
        ("config.json", {"model": {"text": {"width": "wide"}}}, "'model.text.width'"),
        ("config.json", {"step": "seven"}, "'step'"),
        ("config.json", {"step": -1}, "'step'"),
        ("config.json", {"provenance": 3}, "'provenance'"),
        ("preprocessing.json", {"image_size": "large"}, "'image_size'"),
        ("preprocessing.json", {"image_size": 32}, "preprocessing gives 32 pixels, the model takes 16"),
        ("preprocessing.json", {"std": [0.5, 0.0, 0.5]}, "'std.1'"),
    ],
)
def test_hostile_values_are_refused_by_name(
    saved: tuple[Path, CoCa], name: str, changes: dict[str, object], named: str
) -> None:
    values = json.loads((saved[0] / name).read_text())
    replace(saved[0], name, json.dumps(values | changes).encode())
    with pytest.raises(BadInput, match=named):
        load_checkpoint(str(saved[0]))


def test_a_tokenizer_of_another_model_is_refused(saved: tuple[Path, CoCa]) -> None:
    config = json.loads((saved[0] / "config.json").read_text())
    config["model"]["text"]["pad_id"] = 2
    replace(saved[0], "config.json", json.dumps(config).encode())
    with pytest.raises(BadInput, match="pad_id is 0 in the tokenizer, 2 in the model"):
        load_checkpoint(str(saved[0]))


def test_a_file_and_a_run_without_checkpoint_are_refused(saved: tuple[Path, CoCa], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"model.safetensors is not a checkpoint: it holds no manifest.json"):
        load_checkpoint(str(saved[0] / "model.safetensors"))
    (tmp_path / "run/checkpoints/step_000000004").mkdir(parents=True)
    (tmp_path / "run/config.yaml").write_text("")
    with pytest.raises(BadInput, match=r"has no whole checkpoint yet"):
        load_checkpoint(str(tmp_path / "run"))


def test_loading_leaves_the_random_state_alone(saved: tuple[Path, CoCa]) -> None:
    before = torch.get_rng_state()
    load_checkpoint(str(saved[0]))
    assert torch.equal(torch.get_rng_state(), before)
