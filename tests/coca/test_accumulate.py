"""In parts or at once: one step's losses and gradients are the same, with less memory and no more traffic."""

import gc
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from coca.accumulate import forward_backward
from coca.config import ModelConfig
from coca.parallel import parallelize
from coca.train_config import LossConfig, ParallelConfig
from tests.coca.gradients import CPU, Case, Result, assert_close, batch, build, compute, run_once, whole_gradients
from tests.coca.processes import Processes

pytestmark = pytest.mark.usefixtures("one_thread")

SOFTMAX = LossConfig(repeated_captions="ignored", label_smoothing=0.1)
SIGMOID = LossConfig(contrastive="sigmoid", repeated_captions="ignored", contrastive_weight=0.7)


def case_of(tiny_model: ModelConfig, loss: LossConfig, **options: Any) -> Case:
    bias = -10.0 if loss.contrastive == "sigmoid" else None
    return Case(tiny_model.model_copy(update={"initial_logit_bias": bias}), loss, **options)


def in_parts(case: Case, micro_batches: int = 4, **parallel: Any) -> Case:
    return case._replace(parallel=ParallelConfig(micro_batches=micro_batches, **parallel))


@pytest.mark.parametrize("loss", [SOFTMAX, SIGMOID, LossConfig()], ids=["softmax", "sigmoid", "repeats as negatives"])
@pytest.mark.parametrize("micro_batches", [2, 3, 4, 100])
def test_parts_add_up_to_the_batch(tiny_model: ModelConfig, loss: LossConfig, micro_batches: int) -> None:
    """In float64, where nothing but a mistake is as large as 1e-9."""
    case = case_of(tiny_model, loss, patch_dropout=True, precision=torch.float64)
    assert_close(compute(in_parts(case, micro_batches)), compute(case), 1e-9)


@pytest.mark.parametrize("pooling", ["cascade", "parallel", "open_clip"])
def test_parts_add_up_in_float32(tiny_model: ModelConfig, pooling: str) -> None:
    case = Case(tiny_model.model_copy(update={"pooling": pooling}), SOFTMAX, checkpointing=pooling == "parallel")
    assert_close(compute(in_parts(case)), compute(case))


def test_parts_add_up_under_autocast(tiny_model: ModelConfig) -> None:
    """As close to the batch at once as bfloat16 is exact; and closer to it than to float32."""
    case = case_of(tiny_model, SOFTMAX, bfloat16=True)
    at_once, parts, exact = compute(case), compute(in_parts(case)), compute(case._replace(bfloat16=False))
    assert_close(parts, at_once, 0.03)
    assert distance(parts, at_once) < 0.2 * distance(at_once, exact)


def distance(left: Result, right: Result) -> float:
    pairs = [(left.gradients[name], gradient) for name, gradient in right.gradients.items()]
    return float(sum((first - second).square().sum() for first, second in pairs).sqrt())


def test_a_batch_at_once_is_the_plain_step_bit_for_bit(tiny_model: ModelConfig) -> None:
    case = case_of(tiny_model, SOFTMAX, patch_dropout=True)
    ours, plain = build(case), build(case)
    found = run_once(case, ours)
    losses = plain(*batch(case))
    (losses.contrastive + 2 * losses.captioning).backward()
    assert found.equal(torch.stack(losses))
    expected = whole_gradients(plain.model)
    assert all(gradient.equal(expected[name]) for name, gradient in whole_gradients(ours.model).items())


def test_gradients_add_to_those_that_are_there(tiny_model: ModelConfig) -> None:
    case = in_parts(case_of(tiny_model, SIGMOID))
    objective = build(case)
    once = compute(case).gradients
    for _ in range(2):
        run_once(case, objective)
    torch.testing.assert_close(whole_gradients(objective.model), {name: 2 * value for name, value in once.items()})


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("loss", [SOFTMAX, SIGMOID], ids=["softmax", "sigmoid"])
def test_two_workers_in_parts_give_the_gradients_of_one(
    processes: Processes, tiny_model: ModelConfig, kind: str, loss: LossConfig
) -> None:
    case = case_of(tiny_model, loss, patch_dropout=True, checkpointing=loss is SIGMOID)
    expected = compute(case)
    for found in processes.run(2, compute, in_parts(case, kind=kind)):
        assert_close(found, expected)


@pytest.mark.soak
@pytest.mark.parametrize("options", [{"kind": "ddp"}, {"kind": "fsdp"}, {"kind": "fsdp", "shard_workers": 2}], ids=str)
@pytest.mark.parametrize("bfloat16", [False, True])
def test_four_workers_in_parts_give_the_gradients_of_one(
    processes: Processes, tiny_model: ModelConfig, options: dict[str, Any], bfloat16: bool
) -> None:
    case = case_of(tiny_model, SIGMOID, patch_dropout=True, bfloat16=bfloat16)
    expected = compute(case)
    for found in processes.run(4, compute, in_parts(case, 2, **options)):
        assert_close(found, expected, 0.05 if bfloat16 else 1e-5)


@pytest.mark.soak
@pytest.mark.parametrize(("world", "kind"), [(1, "ddp"), (2, "ddp"), (2, "fsdp")])
def test_compiled_parts_add_up(processes: Processes, tiny_model: ModelConfig, world: int, kind: str) -> None:
    case = case_of(tiny_model, SOFTMAX, patch_dropout=True)
    expected = compute(case)
    for found in processes.run(world, compute, in_parts(case, 2, kind=kind)._replace(compiled=True)):
        assert_close(found, expected)


def reductions(case: Case) -> int:
    """How often FSDP reduces gradients in a step."""
    objective = parallelize(build(case), case.parallel, CPU)
    name = (
        "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
    )  # torch < 2.13
    with patch.object(dist, name, wraps=getattr(dist, name)) as reduce:
        run_once(case, objective)
    return reduce.call_count


def buckets(case: Case) -> int:
    """How often DDP averages a bucket of gradients in a step."""
    objective: Any = parallelize(build(case), case.parallel, CPU)
    seen = []

    def count(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        seen.append(bucket.index())
        averaged = torch.futures.Future[Tensor]()
        averaged.set_result(bucket.buffer())
        return averaged

    objective.register_comm_hook(None, count)
    run_once(case, objective)
    return len(seen)


@pytest.mark.parametrize(("kind", "count", "times"), [("fsdp", reductions, 4), ("ddp", buckets, 1)])
def test_gradients_travel_once_or_lie_in_shards(
    processes: Processes, tiny_model: ModelConfig, kind: str, count: Any, times: int
) -> None:
    """FSDP reduces after each part: whole gradients between two parts would take the memory that shards are for."""
    case = Case(tiny_model)
    once = processes.run(2, count, case._replace(parallel=ParallelConfig(kind=kind)))
    assert once[0] > 0
    assert processes.run(2, count, in_parts(case, kind=kind)) == [times * each for each in once]


class Kept:
    """Bytes that autograd holds for the backward pass, and the most it held at a time."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def pack(self, tensor: Tensor) -> "Held":
        return Held(self, tensor)


class Held:
    def __init__(self, kept: Kept, tensor: Tensor) -> None:
        self.tensor, self._kept = tensor, kept
        kept.now += tensor.nbytes
        kept.most = max(kept.most, kept.now)

    def __del__(self) -> None:
        self._kept.now -= self.tensor.nbytes


def most_kept(case: Case) -> int:
    """Peak bytes of saved tensors during a step, but for the weights among them."""
    objective = build(case)
    weights = sum(parameter.nbytes for parameter in objective.parameters())
    images, tokens, kept_patches = (None if value is None else torch.cat([value] * 8) for value in batch(case))
    kept = Kept()
    gc.disable()
    with saved_tensors_hooks(kept.pack, lambda held: held.tensor):
        forward_backward(
            objective, images, tokens, kept_patches, case.loss, case.parallel.micro_batches, lambda: nullcontext()
        )
    gc.enable()
    assert kept.now == 0
    return kept.most - weights


def test_parts_need_less_memory(tiny_model: ModelConfig) -> None:
    case = Case(tiny_model)
    at_once, by_4, by_16 = (most_kept(in_parts(case, count)) for count in (1, 4, 16))
    assert by_4 < 0.3 * at_once
    assert by_16 < 0.12 * at_once
