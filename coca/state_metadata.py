"""The metadata of a sharded state: which tensors there are, and which piece of each lies where."""

import io
import pickle
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata


def parse_metadata(data: bytes) -> Metadata:
    """What the bytes of ``.metadata`` say. They are a pickle: only for those that a manifest vouches for.

    Raises:
        pickle.UnpicklingError: they name something that DCP's metadata is not made of.
    """
    metadata = _MetadataUnpickler(io.BytesIO(data)).load()
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}, not DCP's metadata")
    return metadata


def describe_misfit(metadata: Metadata, tensors: Mapping[str, Tensor]) -> list[str]:
    """In what the tensors of a checkpoint differ from those that are wanted, by name."""
    held = metadata.state_dict_metadata
    problems = [f"{name} is missing" for name in tensors if name not in held]
    problems += [f"{name} is unknown" for name in held if name not in tensors]
    for name, tensor in tensors.items():
        stored = held.get(name)
        if not isinstance(stored, TensorStorageMetadata):
            continue
        if stored.size != tensor.shape:
            problems.append(f"{name} has shape {tuple(stored.size)}, not {tuple(tensor.shape)}")
        elif stored.properties.dtype != tensor.dtype:
            problems.append(f"{name} is {stored.properties.dtype}, not {tensor.dtype}")
    return problems


class _MetadataUnpickler(pickle.Unpickler):
    """Makes nothing but what DCP's metadata is made of."""

    _MADE_OF: Mapping[str, tuple[str, ...]] = {
        "torch.distributed.checkpoint.metadata": (
            "Metadata",
            "MetadataIndex",
            "TensorStorageMetadata",
            "TensorProperties",
            "ChunkStorageMetadata",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        ),
        "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
        "torch.serialization": ("_get_layout",),
        "torch": ("Size",),
    }

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in self._MADE_OF.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which DCP's metadata is not made of")
        return super().find_class(module, name)
