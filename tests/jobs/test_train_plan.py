"""The plan of a run: numbers that can be reckoned by hand, and what it rests on."""

import functools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from coca.dataset import Dataset
from coca.errors import BadInput
from coca.memory import memory
from coca.meter import sample_flops
from coca.mixture import Mixture, Source
from coca.model import CoCa
from coca.optim import Optimizer
from coca.same_run import fit_to_tokenizer
from coca.tokenizer import Tokenizer
from coca.train_config import (
    AugmentConfig,
    OptimizerConfig,
    ParallelConfig,
    ParameterRule,
    ResolutionPhase,
    TrainConfig,
)
from jobs import train_speed
from jobs.config import DataConfig, TrainRunConfig
from jobs.train_plan import plan, print_plan
from jobs.train_speed import UTILISATION, Stretch, stretches

MakeDataset = Callable[..., Dataset]
GPUS = [{"CPU": 64.0, "GPU": 8.0, "accelerator_type:H100": 1.0}]


@pytest.fixture
def mixture(tmp_path: Path, tokenizer: Tokenizer, publish_dataset: MakeDataset) -> Mixture:
    """24 and 8 selected samples, three lanes in four from the first."""
    first = publish_dataset(tmp_path / "first", tokenizer, files=(12, 14), unselected=(0, 5))
    second = publish_dataset(tmp_path / "second", tokenizer, files=(8,))
    return Mixture([Source(first, 3.0), Source(second, 1.0)])


def run_config(train: TrainConfig, workers: dict[str, Any] | None = None, **changed: Any) -> TrainRunConfig:
    values = {
        "data": (DataConfig(uri="first"), DataConfig(uri="second")),
        "out": "runs/first",
        "workers": workers or {},
    }
    return TrainRunConfig.model_validate(values | {"train": train} | changed)


@pytest.fixture(autouse=True)
def rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_speed, "measure_matrix_rate", lambda device, precision: 1e9)


def changed(config: TrainConfig, **values: Any) -> TrainConfig:
    return TrainConfig.model_validate({**config.model_dump(), **values})


def test_what_is_seen_of_each_dataset_follows_its_lanes(mixture: Mixture, tiny_train: TrainConfig) -> None:
    found = plan(run_config(changed(tiny_train, steps=12)), mixture, None)
    assert found["samples"] == 96
    first, second = found["datasets"]
    assert (first["selected"], first["lanes"], first["samples"], first["passes"]) == (24, 3, 72, 3.0)
    assert (second["selected"], second["lanes"], second["samples"], second["passes"]) == (8, 1, 24, 3.0)
    assert (first["wanted_share"], first["share"], second["share"]) == (0.75, 0.75, 0.25)


def test_operations_follow_picture_sizes_and_dropped_patches(mixture: Mixture, tiny_train: TrainConfig) -> None:
    config = changed(
        tiny_train,
        steps=20,
        resolutions=[ResolutionPhase(from_step=10, image_size=32)],
        augment=AugmentConfig(patch_dropout=0.5, unmasked_fraction=0.25),
    )
    assert list(stretches(config)) == [Stretch(0, 10, 16, 0.5), Stretch(10, 5, 32, 0.5), Stretch(15, 5, 32, 0.0)]
    flops = functools.partial(sample_flops, fit_to_tokenizer(config, mixture.tokenizer).model, 12)
    found = plan(run_config(config), mixture, None)
    assert found["flops"] == 8 * (10 * flops(16, 2) + 5 * flops(32, 8) + 5 * flops(32))
    assert [part["flops_per_sample"] for part in found["stretches"]] == [flops(16, 2), flops(32, 8), flops(32)]
    assert list(stretches(tiny_train)) == [Stretch(0, 6, 16, 0.0)]


def test_hours_say_what_they_rest_on(mixture: Mixture, tiny_train: TrainConfig) -> None:
    found = plan(run_config(tiny_train, {"count": 2, "threads": 3}), mixture, [{"CPU": 2.0}])
    assert found["hours"] == pytest.approx(found["flops"] / (2 * 1e9 * UTILISATION) / 3600)
    assert found["stretches"][0]["samples_per_s"] == pytest.approx(48 / found["hours"] / 3600)
    assert found["hours_assume"].endswith("TFLOP/s, a matrix product measured on this machine with 3 threads")
    gpus = run_config(changed(tiny_train, precision="bfloat16"), {"count": 4})
    found = plan(gpus, mixture, [*GPUS, {"GPU": 8.0, "accelerator_type:A100": 1.0}])
    assert found["hours"] == pytest.approx(found["flops"] / (4 * 312e12 * UTILISATION) / 3600)
    assert found["hours_assume"] == "4 workers at 40% of 312 TFLOP/s, the data sheet of A100"


def test_of_gpus_that_nobody_knows_no_hours_are_told(
    mixture: Mixture, tiny_train: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = plan(run_config(tiny_train), mixture, [{"CPU": 8.0, "GPU": 1.0, "accelerator_type:X9": 1.0}])
    assert found["hours"] is found["stretches"][0]["samples_per_s"] is None
    assert "the cluster's GPUs (X9) are not in" in found["hours_assume"]


def test_a_run_that_goes_on_is_told_the_hours_that_are_left(
    mixture: Mixture, tiny_train: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_config(changed(tiny_train, steps=20, resolutions=[ResolutionPhase(from_step=10, image_size=32)]))
    whole, rest = plan(config, mixture, None), plan(config, mixture, None, resumed_from=14)
    small, large = (part["flops_per_sample"] for part in whole["stretches"])
    assert whole["hours"] / rest["hours"] == pytest.approx((10 * small + 10 * large) / (6 * large))
    assert (whole["resumed_from"], whole["steps_left"], rest["steps_left"]) == (None, 20, 6)
    assert (whole["steps"], whole["flops"]) == (rest["steps"], rest["flops"])
    assert plan(config, mixture, None, resumed_from=20)["hours"] == 0
    print_plan(rest)
    told = capsys.readouterr().out
    assert "20 of 8 samples: 160; goes on from step 14\n" in told
    assert " for the 6 steps left: 1 worker at 40%" in told


def test_resources_that_ray_is_asked_for(mixture: Mixture, tiny_train: TrainConfig) -> None:
    config = run_config(tiny_train, {"count": 4, "least": 2, "cpus": 2.0})
    asked = plan(config, mixture, [{"CPU": 4.0}])["ray"]
    assert asked == {
        "workers": 4,
        "least_workers": 2,
        "per_worker": {"CPU": 2.0},
        "total": {"CPU": 8.0},
        "cluster": {"CPU": 4.0, "GPU": 0.0},
        "places": 2,
        "fits": True,
    }
    split = plan(config, mixture, [{"CPU": 3.0}, {"CPU": 1.0}])["ray"]
    assert (split["cluster"]["CPU"], split["places"], split["fits"]) == (4.0, 1, False)
    unknown = plan(config, mixture, None)["ray"]
    assert (unknown["cluster"], unknown["places"], unknown["fits"]) == (None, None, None)


def test_gpus_are_used_wherever_there_are_any(mixture: Mixture, tiny_train: TrainConfig) -> None:
    config = run_config(tiny_train, {"count": 4, "cpus": 2.0})
    asked = plan(config, mixture, GPUS)["ray"]
    assert (asked["total"], asked["fits"]) == ({"CPU": 8.0, "GPU": 4.0}, True)
    few = plan(config, mixture, [{"CPU": 64.0}, {"CPU": 64.0, "GPU": 2.0}])["ray"]
    assert (few["total"]["GPU"], few["places"], few["fits"]) == (4.0, 2, False)


def test_an_elastic_run_is_reckoned_with_numbers_of_workers_that_it_can_have(
    mixture: Mixture, tiny_train: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    train = changed(tiny_train, batch_size=24, lanes=12)
    found = plan(run_config(train, {"count": 7, "least": 2}), mixture, None)
    assert (found["ray"]["workers"], found["ray"]["least_workers"]) == (6, 2)
    assert found["ray"]["total"] == {"CPU": 6.0}
    assert found["hours"] == pytest.approx(found["flops"] / (6 * 1e9 * UTILISATION) / 3600)
    many, few = found["memory_per_worker"], found["memory_per_worker_of_least"]
    assert few["activations"] == 3 * many["activations"]
    print_plan(found)
    told = capsys.readouterr().out
    assert "a worker of 6: weights" in told
    assert "a worker of 2: weights" in told
    sharded = changed(train, parallel=ParallelConfig(kind="fsdp", shard_workers=4))
    found = plan(run_config(sharded, {"count": 7, "least": 2}), mixture, None)
    assert (found["ray"]["workers"], found["ray"]["least_workers"]) == (4, 4)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_state_is_that_of_the_real_model_and_optimizer(name: Any, mixture: Mixture, tiny_train: TrainConfig) -> None:
    config = changed(tiny_train, optimizer=OptimizerConfig(name=name, ema_decay=0.99), keep_best="loss")
    found = plan(run_config(config), mixture, None)
    model_config = fit_to_tokenizer(config, mixture.tokenizer).model
    model = CoCa(model_config)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    state = sum(tensor.nbytes for tensor in Optimizer(model, config.optimizer, config.steps).state().values())
    assert found["parameters"] == weights // 4
    kept = found["memory_per_worker"]
    assert (kept["weights"], kept["gradients"], kept["averaged_weights"]) == (weights, weights, weights)
    assert kept["optimizer"] == state
    assert kept["activations"] == memory(model_config, 8, "float32", checkpointing=False).activations
    assert kept["total"] == sum(value for part, value in kept.items() if part != "total")
    assert found["checkpoint_bytes"] == 3 * weights + state
    assert found["checkpoints_kept"] == 3


def test_workers_share_the_batch_and_with_fsdp_the_state(mixture: Mixture, tiny_train: TrainConfig) -> None:
    def kept(parallel: ParallelConfig, count: int = 4) -> dict[str, int]:
        config = run_config(changed(tiny_train, parallel=parallel), {"count": count})
        return dict(plan(config, mixture, None)["memory_per_worker"])

    alone, replicated = kept(ParallelConfig(), count=1), kept(ParallelConfig())
    assert replicated["activations"] * 4 == alone["activations"]
    assert replicated["gradients"] == replicated["weights"] == alone["weights"]
    halves = kept(ParallelConfig(micro_batches=2))
    assert halves["activations"] * 2 == replicated["activations"]
    sharded = kept(ParallelConfig(kind="fsdp"))
    assert sharded["optimizer"] == alone["optimizer"] // 4
    assert sharded["gradients"] == alone["gradients"] // 4
    assert (
        alone["weights"] // 4
        < sharded["weights"]
        < kept(ParallelConfig(kind="fsdp", reshard_after_forward=False))["weights"]
    )
    assert kept(ParallelConfig(kind="fsdp", shard_workers=2))["optimizer"] == alone["optimizer"] // 2
    with pytest.raises(BadInput, match=r"shard_workers = 3 divides none of .*: \[4\]"):
        kept(ParallelConfig(kind="fsdp", shard_workers=3))


@pytest.mark.parametrize("reshard", [True, False])
def test_in_bfloat16_blocks_are_gathered_at_half_their_size(
    mixture: Mixture, tiny_train: TrainConfig, reshard: bool
) -> None:
    parallel = ParallelConfig(kind="fsdp", reshard_after_forward=reshard)
    kept = {}
    for precision in ("float32", "bfloat16"):
        config = run_config(changed(tiny_train, parallel=parallel, precision=precision), {"count": 4})
        kept[precision] = plan(config, mixture, None)["memory_per_worker"]
    model = CoCa(fit_to_tokenizer(tiny_train, mixture.tokenizer).model)
    stacks = (model.vision, model.unimodal, model.multimodal)
    blocks = [[p.nbytes for p in block.parameters() if p.ndim > 1] for stack in stacks for block in stack.blocks]
    difference = kept["float32"]["weights"] - kept["bfloat16"]["weights"]
    if reshard:  # twice the largest, without the keys and values of images that come apart
        assert max(map(sum, blocks)) * 0.5 < difference <= max(map(sum, blocks))
    else:
        assert difference == sum(map(sum, blocks)) // 2
    # What travels in bfloat16 is not copied again: left are the poolers' matrices and what lies outside of blocks.
    linears = [layer.weight for layer in model.modules() if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)]
    inside = {id(p) for stack in stacks for block in stack.blocks for p in block.parameters()}
    rest = [p.numel() for p in linears if id(p) not in inside and p is not model.multimodal.head.weight]
    assert kept["bfloat16"]["bfloat16_copies"] == 2 * sum(rest)
    assert kept["float32"]["bfloat16_copies"] == 0


def test_a_rule_that_matches_nothing_and_a_missing_package_are_refused(
    mixture: Mixture, tiny_train: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BadInput, match="matches no parameter"):
        rules = (ParameterRule(match="no_such"),)
        plan(run_config(changed(tiny_train, optimizer=OptimizerConfig(rules=rules))), mixture, None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(BadInput, match="pip install wandb"):
        plan(run_config(tiny_train, trackers=("wandb",)), mixture, None)


def test_the_first_rate_is_that_of_the_warm_up(mixture: Mixture, tiny_train: TrainConfig) -> None:
    optimizer = OptimizerConfig(learning_rate=1.0, warmup_fraction=0.5)
    found = plan(run_config(changed(tiny_train, steps=8, optimizer=optimizer)), mixture, None)
    assert found["learning_rate"] == {"first": pytest.approx(0.2), "peak": 1.0, "last": pytest.approx(0.25)}


def test_it_is_plain_and_told_to_people(
    mixture: Mixture, tiny_train: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    found = plan(run_config(tiny_train, {"count": 2, "cpus": 4, "least": 1}), mixture, [{"CPU": 1.0}, {"CPU": 3.0}])
    assert torch.get_num_threads() == threads
    assert json.loads(json.dumps(found)) == found
    print_plan(found)
    told = capsys.readouterr().out
    assert "6 of 8 samples: 48" in told
    assert "first version 1, 24 samples: 1.50 passes, 75.0% of each batch (75.0% wanted), 3 lanes" in told
    assert "2 workers, 1 at least: 8 CPU; the cluster has 4 CPU, places for 0 of them on its nodes: NOT ENOUGH" in told
    assert re.search(r"from step 0: pictures of 16 pixels, [\d.]+ GFLOP a sample, [\d,.]+ samples/s\n", told)
    assert "goes on" not in told
    print_plan(found | {"hours": 100.8})
    assert "\ntime          4.2 days: 2 workers at 40% of 0.001 TFLOP/s" in capsys.readouterr().out
