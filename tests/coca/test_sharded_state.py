"""torch.distributed.checkpoint over a store: in pieces, into other pieces, and readable by torch alone."""

import pickle
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from coca.manifest import Entry, file_entry
from coca.sharded_state import METADATA, load_state, own_share, save_state
from coca.side_group import SideGroup
from coca.state_metadata import describe_misfit, parse_metadata
from coca.storage import Store
from coca.training_state import HostCopies
from tests.coca.checkpoint_samples import empty_tensors, equals_step, tensors_at
from tests.coca.rank_processes import run_phases


def save(store: Store, tensors: dict[str, Tensor], side: SideGroup) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    own = own_share(tensors, side)
    save_state(store, "c", own, HostCopies().take(own), side, entries.update)
    return entries


def load(store: Store, tensors: dict[str, Tensor], side: SideGroup) -> None:
    load_state(store.child("c"), parse_metadata(store.read(f"c/{METADATA}")), tensors, side)


def test_round_trip_and_entries(tmp_path: Path) -> None:
    store, loaded = Store(tmp_path), empty_tensors()
    entries = save(store, tensors_at(3), SideGroup())
    load(store, loaded, SideGroup())
    assert equals_step(loaded, 3)
    assert entries == {name: file_entry(store.read(f"c/{name}")) for name in ("state/.metadata", "state/__0_0.distcp")}


def test_files_are_bounded_and_read_at_a_stretch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"t{n}": torch.full((n % 7 + 1, 50), float(n)) for n in range(40)}
    monkeypatch.setattr("coca.sharded_state.FILE_BYTES", 4000)
    monkeypatch.setattr("coca.sharded_state._RUN_BYTES", 3000)
    store, side = Store(tmp_path), SideGroup()
    entries = save(store, tensors, side)
    assert len(entries) > 5
    loaded = {name: torch.zeros_like(tensor) for name, tensor in reversed(tensors.items())}
    load(store, loaded, side)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    few = {name: torch.zeros_like(tensors[name]) for name in ("t3", "t20")}
    load(store, few, side)
    assert all(torch.equal(few[name], tensors[name]) for name in few)


def test_torch_alone_reads_it(tmp_path: Path) -> None:
    save(Store(tmp_path), tensors_at(3), SideGroup())
    loaded = empty_tensors()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(loaded, checkpoint_id=str(tmp_path / "c/state"))
    assert equals_step(loaded, 3)


def test_s3_round_trip(s3: str) -> None:
    store, loaded = Store(s3), empty_tensors()
    store.write("c/leftover", b"")
    entries = save(store, tensors_at(3), SideGroup())
    load(store, loaded, SideGroup())
    assert equals_step(loaded, 3)
    assert store.list("c") == ["state"]
    assert sorted(entries) == ["state/.metadata", "state/__0_0.distcp"]


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, ("1/0",)


@pytest.mark.parametrize("value", [Evil(), {"a": 1}, torch.nn.Linear, torch.load])
def test_metadata_that_names_anything_else_is_refused(value: object) -> None:
    with pytest.raises(pickle.UnpicklingError, match=r"it names|it holds"):
        parse_metadata(pickle.dumps(value))


def test_a_misfit_is_named(tmp_path: Path) -> None:
    save(Store(tmp_path), tensors_at(3), SideGroup())
    metadata = parse_metadata(Store(tmp_path).read(f"c/{METADATA}"))
    assert describe_misfit(metadata, tensors_at(0)) == []
    wanted = tensors_at(0) | {"model/matrix": torch.zeros(5, 6), "model/new": torch.zeros(1)}
    wanted["model/scale"] = wanted["model/scale"].double()
    del wanted["rng/torch"]
    assert describe_misfit(metadata, wanted) == [
        "model/new is missing",
        "rng/torch is unknown",
        "model/matrix has shape (6, 5), not (5, 6)",
        "model/scale is torch.float32, not torch.float64",
    ]


def make_sharded(seed: int, mesh: DeviceMesh | None = None) -> dict[str, Tensor]:
    """Blocks in shards, of which some do not divide by the ranks; and a scalar that all ranks hold."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return {**model.state_dict(), "scalar": torch.tensor(float(seed)), "big": torch.full((64,), float(seed))}


def make_whole(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    return {**model.state_dict(), "scalar": torch.tensor(float(seed)), "big": torch.full((64,), float(seed))}


def save_sharded(folder: str) -> None:
    with SideGroup() as side:
        entries = save(Store(folder), make_sharded(1), side)
        assert bool(entries) == (side.rank == 0)
        if side.rank == 0:
            written = {name.split("/")[1].split("_")[2] for name in entries if name != METADATA}
            assert written == {"0", "1", "2", "3"}  # what all hold is shared out too


def save_hybrid(folder: str) -> None:
    """Two copies, each over two ranks: a piece is copied by one of the two ranks that hold it."""
    tensors = make_sharded(1, init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    with SideGroup() as side:
        assert [sorted(own) for own in side.gather(list(own_share(tensors, side)))] == [
            ["0.weight", "big"],
            ["0.weight", "scalar"],
            ["0.bias", "1.bias", "1.weight"],
            ["0.bias", "1.bias", "1.weight"],
        ]
        save(Store(folder), tensors, side)


def save_whole(folder: str) -> None:
    with SideGroup() as side:
        tensors = make_whole(1)
        shares = [set(own) for own in side.gather(list(own_share(tensors, side)))]
        assert shares == [{"big", "scalar"}, tensors.keys() - {"big", "scalar"}]  # 260 bytes and 264
        save(Store(folder), tensors, side)


def load_sharded(folder: str) -> None:
    tensors = make_sharded(2)
    with SideGroup() as side:
        load(Store(folder), tensors, side)
    for name, expected in make_whole(1).items():
        found = tensors[name]
        assert torch.equal(found.full_tensor() if hasattr(found, "full_tensor") else found, expected), name


def load_whole(folder: str) -> None:
    tensors = make_whole(2)
    with SideGroup() as side:
        load(Store(folder), tensors, side)
    assert all(torch.equal(tensors[name], expected) for name, expected in make_whole(1).items())


def fail_on_one(folder: str) -> None:
    """A disk that is full on one rank is an error on each."""
    with SideGroup() as side:
        store = Store(folder)
        if side.rank == 1:
            store.write = lambda path, data: (_ for _ in ()).throw(OSError(28, "No space left on device"))  # type: ignore[method-assign]
        with pytest.raises(CheckpointException) as raised:
            save(store, make_whole(1), side)
        failures = raised.value.failures  # type: ignore[attr-defined]
        assert {rank: cause.errno for rank, (cause, _) in failures.items()} == {1: 28}


def test_other_pieces_than_it_was_saved_in(tmp_path: Path) -> None:
    """4 ranks in shards; then 3 in shards, and one process whole; and the other way round."""
    phases = [("save_sharded", 4), ("load_sharded", 3), ("load_whole", 0), ("save_whole", 2), ("load_sharded", 2)]
    phases += [("save_hybrid", 4), ("load_sharded", 2), ("fail_on_one", 2)]
    run_phases(__name__, phases, str(tmp_path))
