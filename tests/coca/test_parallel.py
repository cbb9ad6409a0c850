"""Over several workers: gradients, shards and whole weights are those of one process."""

from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from coca.config import ModelConfig, ResNetConfig
from coca.errors import BadInput
from coca.parallel import check_shards, full_weights, parallelize
from coca.train_config import LossConfig, ParallelConfig
from tests.coca.gradients import CPU, Case, Result, assert_close, build, compute, run_once
from tests.coca.processes import Processes

pytestmark = pytest.mark.usefixtures("one_thread")

DDP, FSDP, HYBRID = ParallelConfig(), ParallelConfig(kind="fsdp"), ParallelConfig(kind="fsdp", shard_workers=2)
GATHERED = ParallelConfig(kind="fsdp", reshard_after_forward=False)
SIGMOID = LossConfig(contrastive="sigmoid", repeated_captions="ignored", captioning_weight=1.5)


def changed(config: ModelConfig, **updates: Any) -> ModelConfig:
    text = config.text.model_copy(update=updates.pop("text", {}))
    return config.model_copy(update={"text": text, **updates})


def variant(tiny_model: ModelConfig, name: str) -> Case:
    """Between them: every kind of layer, a head that is tied, and both losses."""
    if name == "sigmoid, tied head":
        config = changed(tiny_model, text={"tied_head": True}, initial_logit_bias=-10.0)
        return Case(config, SIGMOID, patch_dropout=True)
    if name == "open_clip":
        text = {"multimodal_block": "open_clip", "embedding_slot": "open_clip"}
        vision = tiny_model.vision.model_copy(update={"class_token": True, "registers": 2, "qk_norm": True})
        return Case(changed(tiny_model, text=text, vision=vision, pooling="open_clip"), checkpointing=True)
    if name == "resnet":
        vision = ResNetConfig(image_size=64, width=8, groups=4, blocks=(1, 1, 1, 1))
        return Case(changed(tiny_model, vision=vision, pooling="parallel"))
    return Case(tiny_model, checkpointing=name == "checkpointing")


VARIANTS = ("plain", "checkpointing", "sigmoid, tied head", "open_clip", "resnet")
CASES = [(name, parallel) for name in VARIANTS for parallel in (DDP, FSDP)]


@pytest.mark.parametrize(("name", "parallel"), [*CASES, ("plain", GATHERED), ("checkpointing", GATHERED)], ids=str)
def test_gradients_are_those_of_one_process(
    processes: Processes, tiny_model: ModelConfig, name: str, parallel: ParallelConfig
) -> None:
    case = variant(tiny_model, name)
    expected = compute(case)
    for found in processes.run(2, compute, case._replace(parallel=parallel)):
        assert_close(found, expected)


@pytest.mark.parametrize("parallel", [DDP, FSDP, HYBRID], ids=str)
def test_four_workers_give_the_gradients_of_one(
    processes: Processes, tiny_model: ModelConfig, parallel: ParallelConfig
) -> None:
    case = variant(tiny_model, "sigmoid, tied head")
    expected = compute(case)
    for found in processes.run(4, compute, case._replace(parallel=parallel)):
        assert_close(found, expected)


def gathered_in(case: Case) -> dict[str, torch.dtype]:
    """What the weights are within a forward pass, and all gradients behind it."""
    objective, found = build(case), {}
    over_all = parallelize(objective, case.parallel, CPU, "bfloat16")
    for stack in (objective.model.vision, objective.model.multimodal):

        def look(mlp: Any, inputs: Any) -> None:
            found.update({"mlp." + name: parameter.dtype for name, parameter in mlp.named_parameters()})
            found["head"] = objective.model.head_VD.dtype

        stack.blocks[0].mlp.register_forward_pre_hook(look)
    pooler = objective.model.caption_pooler
    pooler.kv.register_forward_pre_hook(lambda *_: found.update(queries=pooler.queries_QD.dtype))
    run_once(case, over_all)
    gradients = {parameter.grad.dtype for parameter in objective.parameters()}  # type: ignore[union-attr]
    assert gradients == {torch.float32}
    return found


def test_bfloat16_matrices_are_gathered_in_bfloat16(processes: Processes, tiny_model: ModelConfig) -> None:
    half, single = torch.bfloat16, torch.float32
    for found in processes.run(2, gathered_in, Case(tiny_model, parallel=FSDP, bfloat16=True)):
        assert found == {
            **{"mlp.expand.weight": half, "mlp.expand.bias": single},
            **{"mlp.contract.weight": half, "mlp.contract.bias": single},
            "head": single,
            "queries": single,
        }


@pytest.mark.parametrize("name", VARIANTS)
def test_bfloat16_gradients_are_those_of_one_process(processes: Processes, tiny_model: ModelConfig, name: str) -> None:
    """As near with FSDP as with DDP, where all that differs is which rows a rank sums."""
    case = variant(tiny_model, name)._replace(bfloat16=True)
    expected = without_noise(compute(case))
    for ranks, parallel in ((2, DDP), (2, FSDP), (2, GATHERED), (4, HYBRID)):
        for found in processes.run(ranks, compute, case._replace(parallel=parallel)):
            assert_close(without_noise(found), expected, 0.05)


def without_noise(result: Result) -> Result:
    """Without those gradients that are 0 but for rounding, which bfloat16 has more of."""
    kept = {name: value for name, value in result.gradients.items() if not name.endswith("key_norm.bias")}
    return result._replace(gradients=kept)


@pytest.mark.soak
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("parallel", [DDP, FSDP], ids=str)
def test_compiled_gradients_are_those_of_one_process(
    processes: Processes, tiny_model: ModelConfig, parallel: ParallelConfig, checkpointing: bool
) -> None:
    case = Case(tiny_model, checkpointing=checkpointing)
    expected = compute(case)
    for found in processes.run(2, compute, case._replace(parallel=parallel, compiled=True)):
        assert_close(found, expected)


def train_two_steps(case: Case) -> dict[str, Any]:
    """What a worker holds before and after two steps that throw the temperature out of its bounds."""
    objective = build(case)
    over_all = parallelize(objective, case.parallel, CPU)
    model = objective.model
    before = full_weights(model)
    for _ in range(2):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run_once(case, over_all)
        optimizer.step()
        optimizer.zero_grad()
        model.log_logit_scale.data.add_(100)
        model.clamp_logit_scale()
    matrices = [value for value in model.parameters() if value.ndim > 1]  # the others stay whole
    held = [value.to_local() if isinstance(value, DTensor) else value for value in matrices]
    return {
        "before": before,
        "after": full_weights(model),
        "scale": float(model.logit_scale.detach()),
        "held": sum(value.numel() for value in held),
        "all": sum(value.numel() for value in matrices),
    }


@pytest.mark.parametrize("parallel", [DDP, FSDP, HYBRID], ids=str)
def test_whole_weights_are_those_of_one_process(
    processes: Processes, tiny_model: ModelConfig, parallel: ParallelConfig
) -> None:
    case = Case(tiny_model)
    expected = train_two_steps(case)
    first, *others = processes.run(4, train_two_steps, case._replace(parallel=parallel))
    assert all(not other["before"] and not other["after"] for other in others)
    assert [found["scale"] for found in (first, *others)] == [pytest.approx(100)] * 4
    torch.testing.assert_close(first["before"], expected["before"], rtol=0, atol=0)
    torch.testing.assert_close(first["after"], expected["after"], rtol=1e-4, atol=1e-5)
    shards = 1 if parallel.kind == "ddp" else parallel.shard_workers or 4
    share = sum(found["held"] for found in (first, *others)[:shards]) / first["all"]
    assert share == pytest.approx(1, abs=0.01) if shards > 1 else share == 1


def test_whole_weights_are_copies(tiny_model: ModelConfig) -> None:
    model = build(Case(tiny_model, precision=torch.float64)).model
    weights = full_weights(model)
    assert weights.keys() == model.state_dict().keys()
    assert all(value.dtype == torch.float32 for value in weights.values())
    model.log_logit_scale.data.zero_()
    assert weights["log_logit_scale"] != 0
    model = build(Case(tiny_model)).model
    assert full_weights(model)["log_logit_scale"].data_ptr() != model.log_logit_scale.data_ptr()


def test_one_process_needs_no_wrapper(tiny_model: ModelConfig) -> None:
    objective = build(Case(tiny_model))
    assert parallelize(objective, FSDP, CPU) is objective


def test_shards_have_to_fit_the_workers() -> None:
    config = ParallelConfig(kind="fsdp", shard_workers=4)
    check_shards(config, 8)
    check_shards(FSDP, 7)
    with pytest.raises(BadInput, match="shard_workers = 4 does not divide the 6 workers") as error:
        check_shards(config, 6)
    assert "1, 2, 3, 6" in error.value.way_out
