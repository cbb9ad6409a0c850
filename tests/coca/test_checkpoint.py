"""Checkpoints: whole or refused."""

import json
import random
from pathlib import Path

import pytest
import torch

from coca.checkpoint import (
    ResumeState,
    checkpoint_path,
    list_checkpoints,
    load_checkpoint,
    load_model,
    load_resume,
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
        resume=ResumeState({"x/step": torch.tensor(3.0)}, position=7, fixed={"seed": 0}),
    )


def test_round_trip(saved: tuple[Path, CoCa], tokenizer: Tokenizer) -> None:
    folder, model = saved
    loaded = load_checkpoint(str(folder))
    assert all(torch.equal(a, b) for a, b in zip(loaded.model.parameters(), model.parameters(), strict=True))
    assert (loaded.step, loaded.provenance, loaded.model.training) == (7, {"dataset": "here"}, False)
    assert loaded.preprocessing.mean == (0.1, 0.2, 0.3)
    assert loaded.tokenizer.fingerprint == tokenizer.fingerprint
    state = load_resume(Store(folder.parent.parent), checkpoint_path(7), model)
    assert (state.position, state.fixed, state.optimizer["x/step"].item()) == (7, {"seed": 0}, 3.0)


def test_s3_round_trip(s3: str, tiny_model: ModelConfig, tokenizer: Tokenizer) -> None:
    model = CoCa(tiny_model)
    save(Store(s3), "ckpt", model, tokenizer)
    assert torch.equal(load_model(f"{s3}/ckpt").log_logit_scale, model.log_logit_scale)


def test_a_run_folder_gives_its_newest_checkpoint(saved: tuple[Path, CoCa], tokenizer: Tokenizer) -> None:
    run = saved[0].parent.parent
    save(Store(run), checkpoint_path(10), saved[1], tokenizer)
    (run / checkpoint_path(12)).mkdir()  # a save that was cut off: no manifest
    assert list_checkpoints(Store(run)) == [7, 10]
    assert load_checkpoint(str(run)).digest == load_checkpoint(str(run / checkpoint_path(10))).digest


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


def test_weights_that_do_not_fit_are_named(saved: tuple[Path, CoCa]) -> None:
    """Key and shape of every mismatch, with digests that are right."""
    import hashlib

    folder = saved[0]
    config = json.loads((folder / "config.json").read_text())
    config["model"]["embed_dim"] = 4
    data = json.dumps(config).encode()
    (folder / "config.json").write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["config.json"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BadInput, match=r"image_projection.weight has shape \(8, 16\), not \(4, 16\)"):
        load_checkpoint(str(folder))
