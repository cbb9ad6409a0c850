"""The state of a run in shards: torch.distributed.checkpoint (DCP) over a :class:`coca.storage.Store`.

``state/`` of a checkpoint holds what ``torch.distributed.checkpoint.FileSystemReader`` reads too: files
``__<rank>_<n>.distcp``, and ``.metadata``, which says where in them each piece of each tensor lies. A tensor that all
ranks hold whole is written by one of them (`own_share`); the pieces of a DTensor by their owners. Whoever loads gives
the tensors to load into, whole or in other pieces than they were saved in.

Files are put together in memory, so that they are written whole or not at all, and tried again on S3; ``FILE_BYTES``
bounds that memory.
"""

import io
import pickle
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, DEFAULT_SUFFIX, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from coca.manifest import Entry, file_entry
from coca.s3 import CutShort
from coca.side_group import SideGroup
from coca.storage import Store

STATE_FOLDER = "state"
METADATA = f"{STATE_FOLDER}/.metadata"
FILE_BYTES = 128 << 20
"""Tensors are gathered into files of about this size, at most."""
_RUN_BYTES = 64 << 20
_GAP_BYTES = 1 << 20
_S3_THREADS = 4


def save_state(
    store: Store,
    path: str,
    tensors: Mapping[str, Tensor],
    copies: Mapping[str, Tensor],
    side: SideGroup,
    finished: Callable[[dict[str, Entry]], None],
) -> None:
    """Write the state into the checkpoint folder ``path``, which is emptied first. Collective.

    Args:
        tensors: what this rank is to write, plain or DTensors; only their shapes and placements are looked at.
        copies: by the same names, what this rank holds of each, on the CPU.
        finished: called on rank 0 once every rank's files are there, with the manifest's entries of all of them.

    Raises:
        CheckpointException: on all ranks, with what went wrong on any of them, ``finished`` included.
    """
    _allow_single_process(side)
    save(
        dict(tensors),
        storage_writer=StoreWriter(store, path, finished),
        planner=_CopiesPlanner(copies),
        process_group=side.group,
        no_dist=side.group is None,
    )


def load_state(folder: Store, metadata: Metadata, tensors: Mapping[str, Tensor], side: SideGroup) -> None:
    """Load the state of a checkpoint folder into ``tensors``, in place. Collective.

    Args:
        metadata: of this checkpoint.

    Raises:
        CheckpointException: on all ranks, with what went wrong on any of them.
    """
    _allow_single_process(side)
    load(
        dict(tensors),
        storage_reader=StoreReader(folder, metadata),
        planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
        process_group=side.group,
        no_dist=side.group is None,
    )


def own_share(tensors: Mapping[str, Tensor], side: SideGroup) -> dict[str, Tensor]:
    """What this rank is to write: of a tensor that lies in several copies, over ranks or groups of ranks, each copy
    takes some names, of about as many bytes. So a rank keeps a host copy of its share of the state and no more."""
    filled: dict[int, list[int]] = {}
    own = set()
    for name in sorted(tensors, key=lambda name: (-tensors[name].nbytes, name)):  # the same on every rank
        number, copies = _place_among_copies(tensors[name], side)
        share = filled.setdefault(copies, [0] * copies)
        least = share.index(min(share))
        share[least] += tensors[name].nbytes
        if least == number:
            own.add(name)
    return {name: tensor for name, tensor in tensors.items() if name in own}


def _place_among_copies(tensor: Tensor, side: SideGroup) -> tuple[int, int]:
    """Which of how many copies of a tensor this rank holds, or a piece of."""
    if not isinstance(tensor, DTensor):
        return side.rank, side.size
    number, copies = 0, 1
    for dim, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            number = number * tensor.device_mesh.size(dim) + tensor.device_mesh.get_local_rank(dim)
            copies *= tensor.device_mesh.size(dim)
    return number, copies


@dataclass(frozen=True)
class _Written(WriteResult):
    """A piece of a tensor, with the file it went to."""

    file: str
    entry: Entry


class StoreWriter(StorageWriter):
    """Writes one checkpoint's ``state/``."""

    def __init__(self, store: Store, path: str, finished: Callable[[dict[str, Entry]], None]) -> None:
        self._store, self._path, self._finished = store, path, finished
        self._is_coordinator = False

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing is kept from one save to the next."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._is_coordinator = is_coordinator

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        # No rank writes before all have handed in their plans.
        if self._is_coordinator:
            self._store.delete(self._path)
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [replace(plan, storage_data=f"__{rank}_") for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        def write(numbered: tuple[int, list[WriteItem]]) -> list[WriteResult]:
            return self._write_file(f"{plan.storage_data}{numbered[0]}{DEFAULT_SUFFIX}", numbered[1], planner)

        future: Future[list[WriteResult]] = Future()
        with _threads(self._store) as pool:
            files = pool.map(write, enumerate(_bins(plan.items, planner)))
            future.set_result([result for results in files for result in results])
        return future

    def _write_file(self, name: str, items: list[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        buffer, spans = io.BytesIO(), []
        for item in items:
            offset = buffer.tell()
            torch.save(_resolve(planner, item), buffer)
            spans.append(_StorageInfo(name, offset, buffer.tell() - offset))
        data = buffer.getvalue()
        self._store.write(f"{self._path}/{STATE_FOLDER}/{name}", data)
        entry = file_entry(data)
        return [
            _Written(item.index, span.length, span, f"{STATE_FOLDER}/{name}", entry)
            for item, span in zip(items, spans, strict=True)
        ]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        written = [result for of_rank in results for result in of_rank if isinstance(result, _Written)]
        metadata.version = CURRENT_DCP_VERSION
        metadata.storage_data = {result.index: result.storage_data for result in written}
        metadata.storage_meta = self.storage_meta()
        data = pickle.dumps(metadata)
        self._store.write(f"{self._path}/{METADATA}", data)
        self._finished({result.file: result.entry for result in written} | {METADATA: file_entry(data)})

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False  # it is made with its place

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(checkpoint_id=self._path)


class StoreReader(StorageReader):
    """Reads one checkpoint's ``state/``, whose metadata is known already."""

    def __init__(self, folder: Store, metadata: Metadata) -> None:
        self._store, self._metadata = folder, metadata

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing is kept from one load to the next."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """All it needs came with ``metadata``."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file = defaultdict(list)
        for item in plan.items:
            by_file[self._span(item).relative_path].append(item)
        with _threads(self._store) as pool:
            list(pool.map(lambda name: self._read_file(name, by_file[name], planner), by_file))
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _read_file(self, name: str, items: list[ReadItem], planner: LoadPlanner) -> None:
        for run in _runs(sorted(items, key=lambda item: self._span(item).offset), self._span):
            start, last = self._span(run[0]).offset, self._span(run[-1])
            data = memoryview(self._read_range(f"{STATE_FOLDER}/{name}", start, last.offset + last.length))
            for item in run:
                span = self._span(item)
                piece = data[span.offset - start : span.offset - start + span.length]
                _copy_into(planner, item, torch.load(io.BytesIO(piece), map_location="cpu", weights_only=True))

    def _read_range(self, path: str, start: int, stop: int) -> bytes:
        def read() -> bytes:
            with self._store.open(path) as stream:
                stream.seek(start)
                data = bytes(stream.read(stop - start))
            if len(data) != stop - start:
                raise CutShort(f"{self._store.uri}/{path} was read to byte {start + len(data):,} only")
            return data

        return self._store.retry(read)

    def _span(self, item: ReadItem) -> _StorageInfo:
        span: _StorageInfo = self._metadata.storage_data[item.storage_index]
        return span

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False  # it is made with its place


class _CopiesPlanner(DefaultSavePlanner):
    """Plans by the live tensors and writes their copies, so that training goes on meanwhile."""

    def __init__(self, copies: Mapping[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._copies = copies

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._copies[index.fqn]


def _bins(items: Iterable[WriteItem], planner: SavePlanner) -> list[list[WriteItem]]:
    """The items in their order, in files of up to ``FILE_BYTES``, or of one item."""
    bins: list[list[WriteItem]] = []
    filled = FILE_BYTES
    for item in items:
        size = _resolve(planner, item).nbytes
        if filled + size > FILE_BYTES:
            bins.append([])
            filled = 0
        bins[-1].append(item)
        filled += size
    return bins


def _resolve(planner: SavePlanner, item: WriteItem) -> Tensor:
    data = planner.resolve_data(item)
    assert isinstance(data, Tensor), "a state is made of tensors"
    return data


def _runs(items: list[ReadItem], span: Callable[[ReadItem], _StorageInfo]) -> list[list[ReadItem]]:
    """Items of one file, by offset, in runs that are worth reading at a stretch."""
    runs: list[list[ReadItem]] = []
    for item in items:
        here = span(item)
        if runs:
            first, last = span(runs[-1][0]), span(runs[-1][-1])
            near = here.offset - (last.offset + last.length) <= _GAP_BYTES
            if near and here.offset + here.length - first.offset <= _RUN_BYTES:
                runs[-1].append(item)
                continue
        runs.append([item])
    return runs


def _copy_into(planner: LoadPlanner, item: ReadItem, stored: Tensor) -> None:
    for dim, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
        stored = stored.narrow(dim, offset, length)
    target = planner.resolve_tensor(item).detach()
    target.copy_(stored)
    planner.commit_tensor(item, target)


def _threads(store: Store) -> ThreadPoolExecutor:
    # One thread fills a disk; S3 gives each connection its own share.
    return ThreadPoolExecutor(_S3_THREADS if store.is_s3 else 1, thread_name_prefix="checkpoint")


def _allow_single_process(side: SideGroup) -> None:
    if side.group is None:
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
