"""The meter: rates over the time that steps took, FLOPs of the batches really seen, the device's two peaks."""

import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from coca import meter as meter_module
from coca.config import ModelConfig
from coca.cost import flops
from coca.goodput import Goodput, read_goodput
from coca.matrix_rate import measure_matrix_rate, spec_peak
from coca.meter import Meter, peak_memory, sample_flops
from coca.model import CoCa
from coca.storage import Store
from coca.train_config import TrainConfig

CPU = torch.device("cpu")


class Clock:
    """perf_counter and time, moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now

    time = perf_counter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(meter_module, "time", clock)
    monkeypatch.setattr(meter_module, "measure_matrix_rate", lambda device, precision: 1e9)
    monkeypatch.setattr(meter_module, "device_peak", lambda device, precision: 4e9)
    return clock


def batch(tokens: int, size: int = 16, kept: int | None = None) -> Any:
    return SimpleNamespace(
        tokens_BT=torch.zeros(4, tokens),
        pixels_BHWC=torch.zeros(4, size, size, 3),
        kept_patches_BK=None if kept is None else torch.zeros(4, kept),
    )


def test_rates_leave_out_evaluation_and_checkpoints_and_tell_the_wait(
    tiny_train: TrainConfig, tmp_path: Path, clock: Clock
) -> None:
    store = Store(tmp_path / "run")
    meter = Meter(tiny_train, CPU, 2, Goodput(store, workers=2, clock=clock.time))
    with meter.losing("restoring"):
        clock.now += 3
    clock.now += 1
    meter.begin(4)
    for tokens in (7, 9):
        with meter.waiting():
            clock.now += 0.25
        clock.now += 0.75
        meter.step(batch(tokens))
    with meter.losing("evaluation"):
        clock.now += 5
    meter.lose("checkpoint", 0.5)
    clock.now += 0.5
    row = meter.row(6, 6 * 8)
    operations = 4 * 3 * sum(sum(flops(tiny_train.model, tokens).values()) for tokens in (7, 9))
    assert row.pop("peak_memory_gib") == pytest.approx(peak_memory(CPU) / 2**30, rel=0.05)
    assert row == {
        "samples_per_s": 8.0,
        "data_wait_s": 0.5,
        "data_wait": 0.25,
        "checkpoint_pause_s": 0.5,
        "flop_utilisation_spec": pytest.approx(operations / 2 / 4e9),
        "flop_utilisation_measured": pytest.approx(operations / 2 / 1e9),
        "time": clock.now,
        "wall_s": 11.5,
        "goodput": 1.5 / 11.5,
        "lost_s": {"starting": 1.0, "restoring": 3.0, "checkpoint": 0.5, "evaluation": 5.0, "data": 0.5},
    }
    clock.now += 2
    meter.step(batch(7))
    second = meter.row(7, 7 * 8)
    assert (second["samples_per_s"], second["data_wait_s"], second["checkpoint_pause_s"]) == (4.0, 0.0, 0.0)
    meter.close(finished=True)
    account = read_goodput(store)
    assert account is not None
    assert account["seconds"]["new_steps"] == 3.5
    assert account["attempts"][0] == {"time": 1000.0, "from_step": 4, "to_step": 7, "workers": 2}


def test_other_ranks_measure_nothing_and_keep_no_account(
    tiny_train: TrainConfig, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(meter_module, "measure_matrix_rate")
    meter = Meter(tiny_train, CPU, 2)
    meter.begin(0)
    with meter.waiting():
        clock.now += 1
    meter.step(batch(7))
    row = meter.row(1, 8)
    assert (row["samples_per_s"], row["data_wait"], row["wall_s"]) == (8.0, 1.0, 1.0)
    assert row["flop_utilisation_spec"] is row["flop_utilisation_measured"] is None
    assert "goodput" not in row
    meter.close(finished=True)


def test_operations_of_another_picture_size_and_of_fewer_patches(tiny_model: ModelConfig) -> None:
    def sized(size: int) -> ModelConfig:
        vision = tiny_model.vision.model_copy(update={"image_size": size})
        return tiny_model.model_copy(update={"vision": vision})

    assert sample_flops(tiny_model, 9, 16) == 3 * sum(flops(tiny_model, 9).values())
    assert sample_flops(tiny_model, 9, 48) == 3 * sum(flops(sized(48), 9).values())
    # 36 of 64 patches cost what a picture of 36 costs, but all 64 are embedded.
    embedded = 3 * (64 - 36) * 2 * 3 * 8**2 * tiny_model.vision.width
    assert sample_flops(tiny_model, 9, 64, 36) == sample_flops(tiny_model, 9, 48) + embedded
    assert sample_flops(tiny_model, 9, 64, 64) == sample_flops(tiny_model, 9, 64)


def test_operations_of_dropped_patches_are_those_that_torch_counts(tiny_model: ModelConfig) -> None:
    def counted(kept: int | None) -> int:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            kept_patches_BK = None if kept is None else torch.zeros(1, kept, dtype=torch.long)
            CoCa(tiny_model).encode_image(torch.empty(1, 3, 64, 64), kept_patches_BK)
        return counter.get_total_flops()

    saved = sample_flops(tiny_model, 9, 64) - sample_flops(tiny_model, 9, 64, 20)
    assert saved == 3 * (counted(None) - counted(20)) > 0


@pytest.mark.parametrize(
    ("name", "precision", "tf32", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", "bfloat16", False, 312e12),
        ("NVIDIA A100-SXM4-80GB", "float32", False, 19.5e12),
        ("NVIDIA A100-SXM4-80GB", "float32", True, 156e12),
        ("NVIDIA H100 80GB HBM3", "bfloat16", False, 989e12),
        ("NVIDIA H100 PCIe", "bfloat16", False, 756e12),
        ("NVIDIA H200", "bfloat16", False, 989e12),
        ("NVIDIA GH200 480GB", "bfloat16", False, 990e12),
        ("NVIDIA L40S", "bfloat16", False, 362e12),
        ("NVIDIA L4", "bfloat16", False, 121e12),
        ("NVIDIA A10G", "bfloat16", False, 70e12),
        ("NVIDIA A10", "bfloat16", False, 125e12),
        ("Tesla V100-SXM2-16GB", "bfloat16", False, None),
        ("Tesla T4", "float32", True, 8.1e12),
        ("H100", "bfloat16", False, 989e12),
        ("NVIDIA RTX A1000", "bfloat16", False, None),
        ("cpu", "float32", False, None),
    ],
)
def test_peaks_of_data_sheets(name: str, precision: str, tf32: bool, peak: float | None) -> None:
    assert spec_peak(name, precision, tf32=tf32) == peak


def test_the_matrix_rate_is_measured_once_soon_and_without_random_numbers() -> None:
    measure_matrix_rate.cache_clear()
    state = torch.get_rng_state()
    started = time.perf_counter()
    rate = measure_matrix_rate(CPU, "float32")
    first_s = time.perf_counter() - started
    assert 1e8 < rate < 1e14
    assert first_s < 1
    assert measure_matrix_rate(CPU, "float32") == rate
    assert measure_matrix_rate.cache_info().hits == 1
    assert torch.equal(torch.get_rng_state(), state)


def test_peak_memory_on_a_cpu_is_the_high_water_mark_of_the_process() -> None:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    assert peak_memory(CPU) == pytest.approx(int(found[1]) * 1024, rel=0.02)
