"""What `coca train` refuses before a worker starts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from coca.config import ModelConfig, Preprocessing
from coca.errors import BadInput
from coca.held_out import PREFIX, HeldOut
from coca.model import CoCa
from coca.run_folder import RunFolder
from coca.tokenizer import Tokenizer
from coca.train_config import FeedConfig, TrainConfig
from jobs.config import DataConfig, TrainRunConfig, WorkersConfig
from jobs.train_checks import HELD_OUT_MEASURES, check_cluster, check_measures, check_source


def config(
    out: Path | str = "unused", held_out: str | None = None, feed: FeedConfig | None = None, **train: Any
) -> Any:
    values = {"steps": 100, "checkpoint_every": 10, "lanes": 12, "batch_size": 24} | train
    return TrainRunConfig(
        data=(DataConfig(uri="unused"),),
        out=str(out),
        held_out=held_out,
        feed=feed or FeedConfig(),
        train=TrainConfig.model_validate(values),
    )


@pytest.mark.parametrize(
    ("held_out", "train", "message"),
    [
        (None, {"evaluate_every": 5}, r"evaluate_every = 5 without a set to evaluate on. Give --held-out"),
        (None, {"keep_best": "los"}, r"keep_best = los is no measure of metrics.jsonl. Give one of loss, "),
        (None, {"keep_best": "held_out_caption_loss"}, r"keep_best = held_out_caption_loss without a held-out set"),
        ("f", {"keep_best": "held_out_caption_loss"}, r"falls on an evaluation \(evaluate_every = 0\) in 100 steps"),
        ("f", {"keep_best": "held_out_caption_loss", "evaluate_every": 11}, r"Let evaluate_every divide"),
        (None, {"keep_best": "loss", "log_every": 11}, r"falls on a step that is logged \(log_every = 11\)"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(held_out: str | None, train: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        check_measures(config(held_out=held_out, **train))


def test_settings_that_do_something_are_taken() -> None:
    check_measures(config())
    check_measures(config(keep_best="temperature", log_every=4))
    check_measures(config(held_out="f"))
    check_measures(config(held_out="f", keep_best="held_out_caption_loss", evaluate_every=25))
    check_measures(config(held_out="f", keep_best="loss", log_every=11, evaluate_every=5))


def test_the_held_out_measures_are_those_that_rows_have(
    tmp_path: Path, tiny_model: ModelConfig, tokenizer: Tokenizer, make_sample: Callable[[int], dict[str, Any]]
) -> None:
    samples = [make_sample(n) for n in range(6)]
    table = pa.table({"image": [s["image"] for s in samples], "captions": [[str(s["caption"])] for s in samples]})
    pq.write_table(table, tmp_path / "held.parquet")
    measures, _ = HeldOut(str(tmp_path / "held.parquet"), 6).evaluate(
        CoCa(tiny_model), tokenizer, Preprocessing(image_size=16)
    )
    assert {f"{PREFIX}{name}" for name in measures} == set(HELD_OUT_MEASURES)


def decided(
    resources: dict[str, float], out: Path | str, feed: FeedConfig | None = None, **workers: Any
) -> bool | None:
    given = config(out, feed=feed).model_copy(update={"workers": WorkersConfig.model_validate(workers)})
    return check_cluster(given, RunFolder(out), resources).use_gpu


def test_a_run_takes_gpus_wherever_there_are_any(tmp_path: Path) -> None:
    assert decided({"CPU": 8, "GPU": 4}, tmp_path, count=4) is True
    assert decided({"CPU": 8}, tmp_path, count=4) is False
    assert decided({"CPU": 8, "GPU": 4}, tmp_path, count=4, use_gpu=False) is False
    with pytest.raises(BadInput, match=r"4 workers need a GPU each, the cluster has 3. Use fewer --workers, wait"):
        decided({"CPU": 8, "GPU": 3}, tmp_path, count=4)  # a node was lost


def test_a_run_that_began_on_gpus_goes_on_on_gpus(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("workers:\n  use_gpu: true\n")
    with pytest.raises(BadInput, match=r"2 workers need a GPU each, the cluster has 0"):
        decided({"CPU": 8}, tmp_path, count=2)
    assert decided({"CPU": 8}, tmp_path, count=2, use_gpu=False) is False
    for text in ("workers:\n  use_gpu: false\n", "train:\n  steps: 99\n", "- [", ""):
        (tmp_path / "config.yaml").write_text(text)
        assert decided({"CPU": 8}, tmp_path, count=2) is False


def test_a_real_run_does_not_go_on_with_made_up_batches(tmp_path: Path) -> None:
    mock = config(tmp_path, feed=FeedConfig(source="mock"))
    check_source(mock, RunFolder(tmp_path))  # none is there yet
    (tmp_path / "config.yaml").write_text(config(tmp_path).to_yaml())
    check_source(config(tmp_path), RunFolder(tmp_path))
    with pytest.raises(BadInput, match=r"started with feed.source = dataset, now it is mock. Give the old value"):
        check_source(mock, RunFolder(tmp_path))


def test_tasks_that_decode_need_a_cpu_beside_the_workers(tmp_path: Path) -> None:
    ray = FeedConfig(decode="ray")
    with pytest.raises(BadInput, match=r"needs a CPU beside the workers: 4 workers of 1 CPUs leave 0 of 4"):
        decided({"CPU": 4}, tmp_path, feed=ray, count=4)
    with pytest.raises(BadInput, match=r"3 workers of 1.25 CPUs leave 0.25 of 4"):
        decided({"CPU": 4}, tmp_path, feed=ray, count=6, least=2, cpus=1.25)  # it grows to 3
    assert decided({"CPU": 4}, tmp_path, feed=ray, count=3) is False
    assert decided({"CPU": 4}, tmp_path, count=4) is False
