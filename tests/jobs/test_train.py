"""`coca train` on a real Ray Train: workers start, the run is written, the same command goes on."""

import contextlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from coca.checkpoint import load_checkpoint
from coca.dataset import Dataset
from coca.decode import make_decoder
from coca.errors import BadInput, RunFailed
from coca.feeds import open_feed
from coca.mixture import Mixture, Source
from coca.run_folder import RunFolder
from coca.s3 import StoreFailed
from coca.same_run import fit_to_tokenizer
from coca.train import train
from coca.train_config import FeedConfig, TrainConfig
from coca.withdrawn import WITHDRAWN, append_withdrawn
from jobs import run_lease
from jobs.cluster import ClusterInfo
from jobs.config import DataConfig, TrainRunConfig, WorkersConfig
from jobs.train import check, open_dataset, plan_training, run_training, without_withdrawn

MakeDataset = Callable[..., Dataset]


def run_config(dataset: Dataset, out: Path | str, train: TrainConfig, **workers: object) -> TrainRunConfig:
    return TrainRunConfig(
        data=(DataConfig(uri=dataset.store.uri),),
        out=str(out),
        train=train,
        workers=WorkersConfig.model_validate(workers),
    )


@pytest.mark.ray
def test_two_workers_train_and_a_second_call_finds_it_done(
    ray_cluster: ClusterInfo,
    tmp_path: Path,
    make_dataset: MakeDataset,
    tiny_train: TrainConfig,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = run_config(make_dataset(), tmp_path / "run", tiny_train, count=2, cpus=0.5)
    result = run_training(config)
    assert "train: on CPUs: workers.use_gpu=true would choose otherwise" in capsys.readouterr().err
    assert (result["steps"], result["workers"], result["resumed_from"]) == (6, 2, None)
    assert [row["step"] for row in RunFolder(tmp_path / "run").read_metrics()] == [1, 2, 3, 4, 5, 6]
    checkpoint = load_checkpoint(result["run"])
    assert checkpoint.step == 6
    assert checkpoint.provenance["dataset_version"] == 1
    assert "seed: 0" in (tmp_path / "run/config.yaml").read_text()
    assert result["report"] == str(tmp_path / "run/report.html")
    assert "<html" in Path(result["report"]).read_text()

    def no_ray() -> None:
        raise AssertionError("no worker is needed")

    again = run_training(config, start_ray=no_ray)
    assert "has its 6 steps already" in capsys.readouterr().err
    goodput = pytest.approx(result["goodput"], abs=0.2)  # it was still under way when a worker told it
    assert again == result | {"resumed_from": 6, "samples_per_s": None, "goodput": goodput}
    with pytest.raises(BadInput, match="holds a run already"):
        run_training(config, must_be_new=True)
    weights = tmp_path / "run" / result["checkpoint"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(AssertionError, match="no worker is needed"):  # a damaged one is not the end
        run_training(config, start_ray=no_ray)


@pytest.fixture
def four_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a cluster were there."""
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 4.0})


@pytest.mark.usefixtures("four_cpus")
def test_what_the_cluster_has_no_room_for_is_refused_before_a_worker_starts(
    tmp_path: Path, make_dataset: MakeDataset, tiny_train: TrainConfig
) -> None:
    dataset = make_dataset()

    def config(**workers: object) -> TrainRunConfig:
        return run_config(dataset, tmp_path / "never", tiny_train, **workers)

    with pytest.raises(BadInput, match="4 workers of 2 CPUs need 8, the cluster has 4"):
        run_training(config(count=4, cpus=2))
    with pytest.raises(BadInput, match="2 workers of 3 CPUs need 6, the cluster has 4"):
        run_training(config(count=4, least=2, cpus=3))
    with pytest.raises(BadInput, match=r"2 workers need a GPU each, the cluster has 0. Use fewer --workers, wait"):
        run_training(config(count=2, use_gpu=True))
    assert not (tmp_path / "never").exists()


class RayAsked(Exception):
    """Raised where Ray would start."""


def no_ray() -> None:
    raise RayAsked


def test_what_does_not_fit_is_refused_before_ray_starts(
    tmp_path: Path, make_dataset: MakeDataset, tiny_train: TrainConfig
) -> None:
    dataset = make_dataset(unselected=(0,))
    config = run_config(dataset, tmp_path / "never", tiny_train, count=3)
    with pytest.raises(BadInput, match=r"3 workers do not divide lanes = 4. Use 1, 2 or 4 workers"):
        run_training(config, start_ray=no_ray)
    few = tiny_train.model_copy(update={"lanes": 16, "batch_size": 16})
    with pytest.raises(BadInput, match=r"row groups with selected samples, too few for lanes = 16"):
        run_training(run_config(dataset, tmp_path / "never", few), start_ray=no_ray)
    with pytest.raises(BadInput, match="no_such_file"):
        run_training(
            config.model_copy(update={"workers": WorkersConfig(), "held_out": "no_such_file.parquet"}),
            start_ray=no_ray,
        )
    with pytest.raises(BadInput, match="keep_best = los is no measure"):
        run_training(run_config(dataset, tmp_path / "never", tiny_train.model_copy(update={"keep_best": "los"})))
    assert not (tmp_path / "never").exists()


def train_here(config: TrainConfig, dataset: Dataset, folder: Path, should_stop: Callable[[], bool]) -> None:
    mixture, feed = Mixture([Source(dataset)]), FeedConfig(decode="threads", decode_workers=1)
    opened = open_feed(
        mixture,
        fit_to_tokenizer(config, mixture.tokenizer),
        feed,
        rank=0,
        world_size=1,
        make_decoder=lambda: make_decoder(feed, config.augment, config.seed),
    )
    with contextlib.closing(opened):
        train(
            config,
            mixture,
            RunFolder(folder),
            batches=opened.batches,
            device=torch.device("cpu"),
            should_stop=should_stop,
        )


@pytest.fixture
def begun(tmp_path: Path, make_dataset: MakeDataset, tiny_train: TrainConfig) -> TrainRunConfig:
    """A run that was stopped after four of its six steps."""
    dataset, steps = make_dataset(), iter([False, False, False, True])
    (tmp_path / "run").mkdir()
    train_here(tiny_train, dataset, tmp_path / "run", lambda: next(steps))
    return run_config(dataset, tmp_path / "run", tiny_train)


def publish_again(dataset: Dataset) -> None:
    """The same rows as version 2."""
    root = Path(dataset.store.root)
    record = json.loads((root / "versions/1.json").read_text())
    (root / "versions/2.json").write_text(json.dumps(record | {"version": 2, "parent": 1}))


def test_a_run_goes_on_with_its_own_version_after_a_refresh(begun: TrainRunConfig) -> None:
    uri = begun.data[0].uri
    publish_again(Dataset(uri))
    with pytest.raises(RayAsked):
        run_training(begun, start_ray=no_ray)
    with pytest.raises(BadInput, match=r"started with data.0.version = 1, now it is 2"):
        run_training(begun.model_copy(update={"data": (DataConfig(uri=uri, version=2),)}), start_ray=no_ray)
    assert open_dataset(uri, None, None).record.version == 2


def withdraw_two(dataset: Dataset) -> None:
    ids = dataset.read_row_group(0)["sample_id"].to_pylist()[:2]
    place = dataset.row_groups.to_pylist()[0]
    rows: list[dict[str, Any]] = [
        dict.fromkeys(WITHDRAWN.names)
        | {"sample_id": each, "samples_path": place["samples_path"], "row_group": 0, "reason": "opted_out"}
        | {"withdrawn_at": 0}
        for each in ids
    ]
    append_withdrawn(dataset.store, pa.Table.from_pylist(rows, schema=WITHDRAWN), "later")


def test_samples_withdrawn_since_are_told_and_do_not_stop_a_run(
    begun: TrainRunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    before = check(begun, RunFolder(begun.out))
    withdraw_two(Dataset(begun.data[0].uri))
    assert (before.withdrawn_since, without_withdrawn(begun, before).withdrawn_since) == (0, 2)
    with pytest.raises(RayAsked):
        run_training(begun, start_ray=no_ray)
    assert "2 samples were withdrawn since the run began" in capsys.readouterr().err


def test_what_stops_a_resumed_run_is_seen_before_ray_starts(begun: TrainRunConfig) -> None:
    other_seed = begun.train.model_copy(update={"seed": 5})
    with pytest.raises(BadInput, match=r"started with seed = 0, now it is 5"):
        run_training(begun.model_copy(update={"train": other_seed}), start_ray=no_ray)
    two = begun.data * 2
    with pytest.raises(BadInput, match=r"started with data.1.version = None, now it is 1"):
        run_training(begun.model_copy(update={"data": two}), start_ray=no_ray)
    shutil.rmtree(Path(begun.out) / "checkpoints")
    with pytest.raises(RayAsked):
        run_training(begun.model_copy(update={"train": other_seed}), start_ray=no_ray)


def outcome(monkeypatch: pytest.MonkeyPatch, ends: Exception | dict[str, Any]) -> None:
    """Let the driver's loop end so."""

    def run(self: object) -> dict[str, Any]:
        if isinstance(ends, Exception):
            raise ends
        return ends

    monkeypatch.setattr("jobs.elastic.Driver.run", run)


@pytest.mark.usefixtures("four_cpus")
def test_a_run_that_fails_says_from_where_the_same_command_goes_on_where_that_helps(
    begun: TrainRunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome(monkeypatch, RunFailed("no space is left"))
    with pytest.raises(RunFailed, match=r"^no space is left. The same command goes on from step 4\.$"):
        run_training(begun, show_progress=False)
    assert "<html" in (Path(begun.out) / "report.html").read_text()  # it shows what went wrong
    bad = RunFailed("sample 7 does not decode")
    bad.repeat_helps = False
    outcome(monkeypatch, bad)
    with pytest.raises(RunFailed, match=r"^sample 7 does not decode\.$"):
        run_training(begun, show_progress=False)


@pytest.mark.usefixtures("four_cpus")
@pytest.mark.parametrize("error", [BadInput("goodput.json is damaged"), KeyError("loss"), OSError("away")])
def test_a_report_that_cannot_be_written_makes_no_failure_of_a_training(
    begun: TrainRunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def write_train_report(run: RunFolder) -> str:
        raise error

    monkeypatch.setattr("jobs.train_report.write_train_report", write_train_report)
    outcome(monkeypatch, {"steps": 6})
    assert run_training(begun, show_progress=False)["report"] is None
    assert f"no report.html: {type(error).__name__}" in capsys.readouterr().err


@pytest.mark.usefixtures("four_cpus")
def test_two_commands_do_not_work_on_one_run(begun: TrainRunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lease, "TTL_S", 0.6)
    monkeypatch.setattr(run_lease, "PATIENCE_S", 0.5)
    before = (Path(begun.out) / "checkpoints").stat().st_mtime_ns
    with (
        run_lease.hold_run(RunFolder(begun.out).store),
        pytest.raises(BadInput, match="is being written by `coca train`"),
    ):
        run_training(begun, show_progress=False)
    assert not (Path(begun.out) / "config.yaml").exists()
    assert (Path(begun.out) / "checkpoints").stat().st_mtime_ns == before


def test_a_dry_run_checks_as_a_run_does_and_writes_nothing(
    tmp_path: Path, make_dataset: MakeDataset, tiny_train: TrainConfig
) -> None:
    cluster: Any = [{"CPU": 4.0}]  # its nodes
    config = run_config(make_dataset(), tmp_path / "never", tiny_train, count=2)
    assert plan_training(config, lambda: cluster)["steps"] == 6
    with pytest.raises(BadInput, match=r"3 workers do not divide lanes = 4"):
        plan_training(config.model_copy(update={"workers": WorkersConfig(count=3)}), lambda: cluster)
    assert not (tmp_path / "never").exists()


def test_a_dry_run_knows_where_a_run_goes_on(begun: TrainRunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr("jobs.train_plan.plan", lambda *arguments, **options: given | options)
    cluster: Any = [{"CPU": 4.0}]  # its nodes
    assert plan_training(begun, lambda: cluster) == {"resumed_from": 4}
    (Path(begun.out) / "config.yaml").touch()
    with pytest.raises(BadInput, match="holds a run already"):
        plan_training(begun, lambda: cluster, must_be_new=True)


@pytest.mark.usefixtures("four_cpus")
def test_a_run_without_checkpoint_takes_the_config_it_is_started_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_dataset: MakeDataset, tiny_train: TrainConfig
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("train:\n  steps: 99\n")  # killed before its first checkpoint
    outcome(monkeypatch, {"steps": 1})
    run_training(run_config(make_dataset(), tmp_path / "run", tiny_train.model_copy(update={"steps": 1})))
    assert "steps: 1\n" in (tmp_path / "run/config.yaml").read_text()


@pytest.mark.ray
def test_a_run_lies_on_s3(
    ray_cluster: ClusterInfo, s3: str, make_dataset: MakeDataset, tiny_train: TrainConfig
) -> None:
    dataset = make_dataset()
    few = tiny_train.model_copy(update={"steps": 2})
    result = run_training(run_config(dataset, f"{s3}/run", few))
    assert (result["steps"], result["run"], result["stopped"]) == (2, f"{s3}/run", None)
    assert result["report"] == f"{s3}/run/report.html"
    assert [row["step"] for row in RunFolder(f"{s3}/run").read_metrics()] == [1, 2]


def test_progress_counts_from_the_first_step_that_is_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from jobs.train import _follow

    run = RunFolder(tmp_path)
    row = {"contrastive_loss": 1.5, "captioning_loss": 2.25, "loss": 6.0, "samples_per_s": 10.0}
    with _follow(run, steps=20, start=4, show=True):
        run.append_metrics({"step": 8, **row})
        time.sleep(1.2)
        run.append_metrics({"step": 16, **row})
    line = capsys.readouterr().err
    assert "train: 16/20 steps" in line
    assert "loss 6.000 (contrastive 1.500, captioning 2.250)" in line
    with _follow(run, steps=20, start=16, show=True):
        pass
    assert capsys.readouterr().err == ""


def test_progress_outlives_a_storage_that_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from jobs import train as driver

    row = {"step": 8, "contrastive_loss": 1.5, "captioning_loss": 2.25, "loss": 6.0, "samples_per_s": 10.0}
    answers: list[Any] = [StoreFailed("away"), OSError("away"), row]

    def last_metrics(self: RunFolder) -> dict[str, Any]:
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, Exception):
            raise answer
        return dict(answer)

    monkeypatch.setattr(driver, "_POLL_S", 0.01)
    monkeypatch.setattr(RunFolder, "last_metrics", last_metrics)
    with driver._follow(RunFolder(tmp_path), steps=20, start=4, show=True):
        time.sleep(0.3)
        assert answers == [row]
    assert "train: 8/20 steps" in capsys.readouterr().err


def test_the_progress_note_tells_losses_rate_and_the_wait_for_data() -> None:
    from jobs.train import _note

    row = {"contrastive_loss": 1.5, "captioning_loss": 2.25, "loss": 6.0, "samples_per_s": 1234.5, "data_wait": 0.031}
    assert _note(row) == "loss 6.000 (contrastive 1.500, captioning 2.250), 1,234.5 samples/s, waiting for data 3%"
