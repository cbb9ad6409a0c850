"""A model over several workers: replicated (DDP), or in shards (FSDP2, ``torch.distributed.fsdp.fully_shard``).

The numbers are those of one process but for the order of sums. With FSDP weights are whole only while a pass of the
``Objective`` needs them: nothing else may compute with the model, every rank has to take part in each pass.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from coca.distributed import rank, sum_over_ranks, world_size
from coca.errors import BadInput
from coca.layers import CrossBlock
from coca.memory import Precision
from coca.model import CoCa
from coca.objective import Objective
from coca.train_config import ParallelConfig

_GATHERED = {
    "float32": MixedPrecisionPolicy(),
    # What comes into a block stays as it is: autocast says what is computed in which precision.
    "bfloat16": MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False),
}


def parallelize(
    objective: Objective, config: ParallelConfig, device: torch.device, precision: Precision = "float32"
) -> nn.Module:
    """The objective over all workers of the process group; itself where there is only one.

    Every worker holds the same weights, on ``device``. With fsdp matrices become ``DTensor``s in place, so optimizers
    are to be made afterwards; vectors and scalars, a thousandth of a model, stay whole. In bfloat16 the matrices of
    blocks are gathered as autocast would have them, at half the traffic; gradients are summed in float32 all the same.

    Raises:
        BadInput: as ``check_shards``.
    """
    check_shards(config, world_size())
    if world_size() == 1:
        return objective
    if config.kind == "ddp":
        devices = [device] if device.type == "cuda" else None
        return DistributedDataParallel(objective, device_ids=devices, gradient_as_bucket_view=True)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # where FSDP puts what it gathers
    return _sharded(objective, config, _mesh(config, device), precision)


def check_shards(config: ParallelConfig, workers: int) -> None:
    """Raises BadInput unless copies of the weights, each sharded over shard_workers, fill all workers."""
    if config.kind == "fsdp" and workers % (config.shard_workers or workers):
        fitting = ", ".join(str(count) for count in range(1, workers + 1) if workers % count == 0)
        raise BadInput(
            f"parallel.shard_workers = {config.shard_workers} does not divide the {workers} workers of the run",
            f"Set it to one of {fitting}, or leave it away to shard over all",
        )


def unwrapped(objective: nn.Module) -> Objective:
    """The objective that ``parallelize`` was given."""
    inside = objective.module if isinstance(objective, DistributedDataParallel) else objective
    assert isinstance(inside, Objective)
    return inside


@contextmanager
def gradient_communication(objective: nn.Module, wanted: bool) -> Iterator[None]:
    """Whether forward and backward passes within it end in gradients that are averaged over ranks; otherwise they add
    to each rank's own, for a later pass to average. With FSDP they always are: whole gradients between two passes would
    take the memory that shards are for."""
    if isinstance(objective, DistributedDataParallel) and not wanted:
        with objective.no_sync():
            yield
    else:
        yield


def average_whole_gradients(objective: nn.Module) -> None:
    """Average over ranks what FSDP leaves alone: the gradients of parameters that stay whole. After each backward pass
    whose gradients are communicated, once."""
    if not isinstance(objective, FSDPModule):
        return
    whole = [parameter.grad for parameter in _whole_parameters(objective) if parameter.grad is not None]
    if whole:
        mean = sum_over_ranks(torch.cat([gradient.flatten() for gradient in whole])) / world_size()
        for gradient, value in zip(whole, mean.split([gradient.numel() for gradient in whole]), strict=True):
            gradient.copy_(value.view_as(gradient))


def full_weights(model: CoCa) -> dict[str, Tensor]:
    """Whole float32 copies of all weights in CPU memory, on rank 0; empty on the others. Every rank has to call it."""
    weights = {}
    for name, value in model.state_dict().items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if rank() == 0:
            weights[name] = whole.detach().to("cpu", torch.float32, copy=True).contiguous()
    return weights


def _mesh(config: ParallelConfig, device: torch.device) -> DeviceMesh:
    """All workers in a row; or, for hybrid shards, a row for each copy. Workers of a node have adjacent ranks."""
    shards = config.shard_workers or world_size()
    if shards == world_size():
        return init_device_mesh(device.type, (shards,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (world_size() // shards, shards), mesh_dim_names=("replicate", "shard"))


def _sharded(objective: Objective, config: ParallelConfig, mesh: DeviceMesh, precision: Precision) -> nn.Module:
    model = objective.model
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # convolutions lie channels last, which FSDP does not know
    if objective.compiled:
        objective.compile_blocks()
    # A linear layer's output is a view; nothing here writes into it.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view tensor", UserWarning)
    ignored, reshard = set(_whole_parameters(objective)), config.reshard_after_forward
    for unit, unit_precision in gathered_units(model, precision):
        policy = _GATHERED[unit_precision]
        fully_shard(unit, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy, ignored_params=ignored)
    # What is left belongs to the objective, and stays gathered from its forward pass to the end of the backward pass:
    # embeddings, positions, projections, and the head, which the loss multiplies by.
    fully_shard(objective, mesh=mesh, reshard_after_forward=False, ignored_params=ignored)
    register_fsdp_forward_method(objective, "features")
    return objective


def gathered_units(model: CoCa, precision: Precision) -> Iterator[tuple[nn.Module, Precision]]:
    """The modules whose matrices FSDP gathers together, inner ones first, and the precision that these travel in."""
    for block in model.multimodal.blocks:
        # A block's keys and values of the image are made before its forward pass begins.
        yield cast(CrossBlock, block).cross_attention.kv, precision
    for stack in (model.vision, model.unimodal, model.multimodal):
        yield from ((block, precision) for block in stack.blocks)
    for pooler in (model.caption_pooler, model.contrastive_pooler):
        if pooler is not None:
            yield pooler, "float32"  # its queries may go through a norm first


def _whole_parameters(objective: nn.Module) -> list[nn.Parameter]:
    """Vectors and scalars. Autocast computes norms in float32, so theirs cannot travel in bfloat16 with the matrices of
    their block; and a tensor without a dimension cannot be sharded."""
    return [parameter for parameter in objective.parameters() if parameter.ndim < 2]
