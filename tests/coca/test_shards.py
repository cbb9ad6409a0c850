"""Optimizers and averages of FSDP2's shards against those of whole parameters: in processes that speak gloo.

Run as a script this file is one of those processes; it fails where a comparison does.
"""

import copy
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from coca.ema import Ema
from coca.optim import Optimizer
from coca.shards import local, rows_by_rank, shard_group, sharded_like
from coca.train_config import OptimizerConfig, ParameterRule

# Rows that no number of ranks divides, fewer rows than ranks, a convolution, vectors and a scalar.
SHAPES: dict[str, tuple[int, ...]] = {
    "tall_out": (7, 3),
    "wide_out": (5, 9),
    "square_out": (6, 6),
    "single_out": (1, 4),
    "token_embedding": (13, 4),
    "queries": (3, 4),
    "kernel_embedding": (5, 3, 2, 2),
    "bias": (7,),
    "short_bias": (2,),
    "temperature": (),
}
RULES = [ParameterRule(match="wide", learning_rate_factor=0.5), ParameterRule(match="bias", weight_decay=0.2)]


class Zoo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))


def sharded_zoo(mesh: DeviceMesh) -> Zoo:
    zoo = Zoo()
    fully_shard(zoo, mesh=mesh, ignored_params={zoo.temperature})
    return zoo


def give_gradients(model: nn.Module, step: int) -> None:
    """The same to every copy, sharded or whole; on even steps so large that they are clipped."""
    generator = torch.Generator().manual_seed(100 + step)
    for name, parameter in model.named_parameters():
        gradient = torch.randn(SHAPES[name], generator=generator) * (10 if step % 2 == 0 else 0.01)
        parameter.grad = like(parameter, gradient)


def like(parameter: Tensor, whole: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_close(sharded: dict[str, Tensor], alone: dict[str, Tensor], tolerance: float, context: object) -> None:
    assert sharded.keys() == alone.keys(), context
    for name, expected in alone.items():
        value = whole(sharded[name])
        assert value.shape == expected.shape, (context, name)
        difference = (value - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
        assert difference <= tolerance, (context, name, float(difference))


def check_optimizer(name: str, mesh: DeviceMesh) -> None:
    config = OptimizerConfig.model_validate({"name": name, "rules": RULES, "weight_decay": 0.1, "warmup_fraction": 0})
    sharded, alone = sharded_zoo(mesh), Zoo()
    optimizers = Optimizer(sharded, config, 20), Optimizer(alone, config, 20)
    averages = Ema(sharded, 0.9), Ema(alone, 0.9)
    for step in range(6):
        give_gradients(sharded, step)
        give_gradients(alone, step)
        norm, expected = (optimizer.step(step) for optimizer in optimizers)
        assert math.isclose(norm, expected, rel_tol=1e-6), (name, step, norm, expected)
        for average in averages:
            average.update(step)
        assert_close(dict(sharded.named_parameters()), dict(alone.named_parameters()), 1e-6, (name, step))
        assert_close(averages[0].state(), averages[1].state(), 1e-6, ("average", name, step))
        # Moments of both signs cancel over the steps, and rounding with them does not.
        assert_close(optimizers[0].state(), optimizers[1].state(), 1e-5, ("state", name, step))
    check_skip(sharded, optimizers[0])
    check_resume(config, mesh, sharded, optimizers[0])


def check_skip(model: nn.Module, optimizer: Optimizer) -> None:
    """The rows of one rank of each copy are no numbers: all ranks leave all as it is."""
    give_gradients(model, 0)
    parameter = dict(model.named_parameters())["tall_out"]
    assert parameter.grad is not None
    if dist.get_rank(shard_group(parameter)) == 0:
        local(parameter.grad).fill_(math.nan)
    before = [local(tensor).clone() for tensor in (*model.parameters(), *optimizer.state().values())]
    assert math.isnan(optimizer.step(6))
    after = [local(tensor) for tensor in (*model.parameters(), *optimizer.state().values())]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


def check_resume(config: OptimizerConfig, mesh: DeviceMesh, straight: nn.Module, optimizer: Optimizer) -> None:
    """From whole tensors written into a fresh copy's live ones, bit for bit."""
    other = sharded_zoo(mesh)
    resumed = Optimizer(other, config, 20)
    other._apply(torch.clone)  # as model.to() would: the same parameters in other memory
    weights = {name: whole(parameter.detach()) for name, parameter in straight.named_parameters()}
    other.load_state_dict({name: like(p, weights[name]) for name, p in other.named_parameters()})
    for name, value in resumed.state().items():
        value.copy_(like(value, whole(optimizer.state()[name])))
    for step in (6, 7):
        for model in (straight, other):
            give_gradients(model, step)
        assert optimizer.step(step) == resumed.step(step)
    for one, same in zip(straight.parameters(), other.parameters(), strict=True):
        assert torch.equal(local(one), local(same))


def check_swap(mesh: DeviceMesh) -> None:
    """A forward pass without gradients leaves FSDP2's gathered weights in place: they must not outlive a swap."""
    torch.manual_seed(0)
    model = nn.Linear(3, 5)
    alone = copy.deepcopy(model)
    fully_shard(model, mesh=mesh)
    ema, x = Ema(model, 0.9), torch.ones(2, 3)
    with torch.no_grad():
        average = alone(x)
        for each in (model, alone):
            each.bias.add_(1)
            each.weight.mul_(3)
        for _ in range(2):
            torch.testing.assert_close(model(x), alone(x), rtol=1e-6, atol=1e-6)
            with ema.applied():
                torch.testing.assert_close(model(x), average, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(model(x), alone(x), rtol=1e-6, atol=1e-6)


def check_layout(mesh: DeviceMesh) -> None:
    zoo = sharded_zoo(mesh)
    for name, parameter in zoo.named_parameters():
        group = shard_group(parameter)
        if name == "temperature":
            assert group is None and sharded_like(parameter, parameter) is parameter  # noqa: PT018
            continue
        assert group is not None
        rows = rows_by_rank(len(parameter), dist.get_world_size(group))
        assert local(parameter).shape[0] == rows[dist.get_rank(group)], name
        part = torch.full((local(parameter).shape[0], 2), float(dist.get_rank(group)))
        wrapped = sharded_like(parameter, part)
        assert local(wrapped).untyped_storage().data_ptr() == part.untyped_storage().data_ptr(), name
        expected = [rank for rank, count in enumerate(rows) for _ in range(count)]
        assert whole(wrapped)[:, 0].tolist() == expected, name


def run_rank(folder: Path, rank: int, ranks: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    meshes = [init_device_mesh("cpu", (ranks,))]
    if ranks == 4:  # two copies, each over two ranks
        meshes.append(init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "shard")))
    for mesh in meshes:
        check_layout(mesh)
        check_swap(mesh)
        for name in ("adamw", "adafactor", "muon"):
            check_optimizer(name, mesh)
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.soak)])
def test_shards_get_the_numbers_of_one_process(tmp_path: Path, ranks: int) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    commands = [[sys.executable, __file__, str(tmp_path), str(rank), str(ranks)] for rank in range(ranks)]
    running = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) for command in commands]
    errors = [process.communicate(timeout=240)[1].decode() for process in running]
    assert [process.returncode for process in running] == [0] * ranks, "\n".join(error[-1500:] for error in errors)


@pytest.mark.parametrize(("rows", "ranks"), [(7, 3), (1, 4), (8, 4), (5, 4), (0, 2), (13, 1)])
def test_rows_by_rank_are_those_of_chunk(rows: int, ranks: int) -> None:
    chunks = [len(chunk) for chunk in torch.empty(rows).chunk(ranks) if len(chunk)]
    assert rows_by_rank(rows, ranks) == chunks + [0] * (ranks - len(chunks))


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    os._exit(0)  # torch's store sometimes aborts in an interpreter that ends after its peers
