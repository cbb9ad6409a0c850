"""Going on: from the newest whole checkpoint, on any number of ranks, or not at all."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from coca.checkpoint import checkpoint_path, list_checkpoints, save_checkpoint
from coca.checkpoint_saver import CheckpointSaver
from coca.config import Preprocessing
from coca.errors import BadInput
from coca.model import CoCa
from coca.restore import Restored, read_fixed, restore
from coca.run_folder import RunFolder
from tests.coca.checkpoint_samples import (
    CONFIG,
    empty_tensors,
    equals_step,
    plain_at,
    save_steps,
    state_at,
    tensors_at,
)
from tests.coca.rank_processes import run_phases


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """With checkpoints of steps 2 and 4."""
    run = RunFolder(tmp_path / "run")
    save_steps(run, 2, 4)
    return run


def damage(run: RunFolder, step: int, name: str = "model.safetensors") -> None:
    run.store.write(f"{checkpoint_path(step)}/{name}", b"")


def test_the_newest_comes_back(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = empty_tensors()
    state = state_at(4)
    assert restore(run, tensors) == Restored(4, state.fixed, state.counters, [])
    assert equals_step(tensors, 4)
    assert read_fixed(run) == state.fixed
    assert capsys.readouterr().err == ""


def test_parameters_are_loaded_in_place(run: RunFolder) -> None:
    parameter = nn.Parameter(torch.zeros(6, 5))
    address = parameter.data_ptr()
    assert restore(run, empty_tensors() | {"model/matrix": parameter})
    assert torch.equal(parameter, tensors_at(4)["model/matrix"])
    assert (parameter.data_ptr(), parameter.requires_grad, parameter.grad) == (address, True, None)


def test_s3(s3: str) -> None:
    run, tensors = RunFolder(s3), empty_tensors()
    save_steps(run, 2, 4, 6, keep=2)
    damage(run, 6, "state/__0_0.distcp")
    restored = restore(run, tensors)
    assert restored is not None
    assert (restored.position, equals_step(tensors, 4), list_checkpoints(run.store)) == (4, True, [4, 6])


def test_a_new_run_begins_at_the_start(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "new")
    assert restore(run, empty_tensors()) is None
    assert read_fixed(run) is None


def test_a_save_that_was_killed_is_swept_and_said(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    run.store.delete(f"{checkpoint_path(4)}/manifest.json")
    (run.path / checkpoint_path(2) / f".x.{'0' * 32}.tmp").write_bytes(b"half")
    restored = restore(run, empty_tensors())
    assert restored is not None
    assert restored.passed_over == ["step_000000004 was never finished, and is removed"]
    assert run.store.list("checkpoints") == ["step_000000002"]
    assert not list(run.path.rglob("*.tmp"))
    said = "resume: step_000000004 was never finished, and is removed\nresume: going on from the checkpoint of step 2\n"
    assert capsys.readouterr().err == said


def test_a_damaged_one_is_passed_over_and_said(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    damage(run, 4)
    tensors = empty_tensors()
    restored = restore(run, tensors)
    assert restored is not None
    assert (restored.position, equals_step(tensors, 2)) == (2, True)
    reason = r"the checkpoint of step 4 is damaged: model.safetensors has 0 bytes where the manifest says "
    assert restored.passed_over[0].startswith(reason)
    assert capsys.readouterr().err.startswith(f"resume: {reason}")
    assert list_checkpoints(run.store) == [2, 4]  # until there is another


def test_nothing_whole_is_no_start_from_zero(run: RunFolder) -> None:
    damage(run, 2)
    damage(run, 4, "resume.json")
    with pytest.raises(
        BadInput, match=r"no whole checkpoint to go on from: the checkpoint of step 4 .* step 2 .*--out"
    ):
        restore(run, empty_tensors())
    assert read_fixed(run) == state_at(2).fixed
    damage(run, 2, "resume.json")
    with pytest.raises(BadInput, match=r"no whole checkpoint to go on from.*resume.json does not match"):
        read_fixed(run)


def test_another_model_is_refused_by_name(run: RunFolder) -> None:
    tensors = empty_tensors() | {f"model/new{n}": torch.zeros(1) for n in range(4)} | {"model/scale": torch.zeros(2)}
    with pytest.raises(BadInput, match=r"another model or optimizer: model/new0 is missing; .* and 2 more"):
        restore(run, tensors)
    assert all(not tensor.any() for tensor in tensors.values())


def test_a_checkpoint_in_anothers_place_is_passed_over(run: RunFolder) -> None:
    shutil.copytree(run.path / checkpoint_path(2), run.path / checkpoint_path(9))
    restored = restore(run, empty_tensors())
    assert restored is not None
    assert restored.position == 4
    assert restored.passed_over == ["the checkpoint of step 9 is damaged: it is that of step 2"]


def test_a_plain_checkpoint_cannot_be_gone_on_from(run: RunFolder) -> None:
    parts = {"tokenizer": None, "preprocessing": Preprocessing(image_size=16), "step": 9, "provenance": {}}
    save_checkpoint(run.store, checkpoint_path(9), model=CoCa(CONFIG), **parts)  # type: ignore[arg-type]
    restored = restore(run, empty_tensors())
    assert restored is not None
    assert restored.passed_over == ["the checkpoint of step 9 is damaged: its manifest lists no resume.json"]


def make(seed: int, sharded: bool) -> dict[str, Tensor]:
    """Weights and optimizer state after a step, in shards where asked for."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    if sharded:
        for block in model:
            fully_shard(block)
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    torch.manual_seed(seed)
    model(torch.rand(8, 5)).square().sum().backward()
    optimizer.step()
    held: dict[str, Tensor] = {f"model/{name}": parameter for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        held |= {f"optimizer/{name}/{key}": value for key, value in optimizer.state[parameter].items()}
    return held | {"rng/torch": torch.full((9,), seed, dtype=torch.uint8)}


def save_in_shards(folder: str) -> None:
    _save(folder, make(1, sharded=True))


def save_whole(folder: str) -> None:
    _save(folder, make(1, sharded=False))


def _save(folder: str, tensors: dict[str, Tensor]) -> None:
    with CheckpointSaver(RunFolder(folder), keep=2) as saver:
        saver.save(state_at(4, tensors), plain_at(4))
        for tensor in tensors.values():
            tensor.detach().zero_()


def restore_in_shards(folder: str) -> None:
    _restore(folder, make(2, sharded=True))


def restore_whole(folder: str) -> None:
    _restore(folder, make(2, sharded=False))


def _restore(folder: str, tensors: dict[str, Tensor]) -> None:
    restored = restore(RunFolder(folder), tensors)
    assert restored is not None
    assert (restored.position, restored.counters) == (4, {"skipped": 4})
    for name, expected in make(1, sharded=False).items():
        found = tensors[name]
        full = found.full_tensor() if hasattr(found, "full_tensor") else found
        torch.testing.assert_close(full, expected, rtol=1e-5, atol=1e-6)
        if name.startswith("rng"):
            assert torch.equal(full, expected)


def see_another_folder(folder: str) -> None:
    """Each rank has its own, of which one holds a checkpoint."""
    mine = RunFolder(f"{folder}/rank" if dist.get_rank() else folder)
    with pytest.raises(BadInput, match=r"see different checkpoints in .*: newest steps \[-1, 8\]. Give --out a folder"):
        restore(mine, empty_tensors())


def pass_over_damage(folder: str) -> None:
    """The rank that has the damaged file in its share tells the others."""
    with CheckpointSaver(RunFolder(folder), keep=2) as saver:
        saver.save(state_at(8, make(3, sharded=False)), plain_at(8))
    if dist.get_rank() == 0:
        Path(f"{folder}/{checkpoint_path(8)}/config.json").write_bytes(b"")
    dist.barrier()
    tensors = make(2, sharded=False)
    restored = restore(RunFolder(folder), tensors)
    assert restored is not None
    reason = "the checkpoint of step 8 is damaged: config.json has 0 bytes where the manifest says "
    assert [each.startswith(reason) for each in restored.passed_over] == [True]
    assert torch.equal(tensors["rng/torch"], make(1, sharded=False)["rng/torch"])


def test_other_ranks_than_it_was_saved_by(tmp_path: Path) -> None:
    """FSDP on 4 ranks to FSDP on 2 and 1, to DDP and to one process; DDP to FSDP."""
    phases = [("save_in_shards", 4), ("restore_in_shards", 2), ("restore_in_shards", 1), ("restore_whole", 2)]
    phases += [("restore_whole", 0), ("save_whole", 2), ("restore_in_shards", 3)]
    phases += [("pass_over_damage", 3), ("see_another_folder", 2)]
    said = run_phases(__name__, phases, str(tmp_path))
    assert said.count("resume: the checkpoint of step 8 is damaged") == 1
