"""`coca tune` on a real Ray Tune."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from coca.dataset import Dataset
from coca.errors import BadInput
from coca.train_config import TrainConfig
from coca.typed_config import build_config
from jobs.cluster import ClusterInfo
from jobs.config import TuneConfig, WorkersConfig
from jobs.tune import draw_weights, run_tuning


@pytest.fixture
def held_out(tmp_path: Path, make_sample: Callable[[int], dict[str, Any]]) -> str:
    samples = [make_sample(n) for n in range(4)]
    table = pa.table({"image": [s["image"] for s in samples], "captions": [[s["caption"]] for s in samples]})
    pq.write_table(table, tmp_path / "held_out.parquet")
    return str(tmp_path / "held_out.parquet")


@pytest.mark.ray
def test_a_study_runs_and_a_second_call_keeps_its_trials(
    ray_cluster: ClusterInfo,
    tmp_path: Path,
    make_dataset: Callable[..., Dataset],
    tiny_train: TrainConfig,
    held_out: str,
) -> None:
    train = tiny_train.model_copy(update={"steps": 2})
    config = TuneConfig(
        data=make_dataset().store.uri, held_out=held_out, out=str(tmp_path / "study"), trials=2, train=train
    )
    result = run_tuning(config)
    rows = result["trials"]
    assert [row["trial"] for row in rows] == [0, 1]
    assert (rows[0]["contrastive_weight"], rows[0]["captioning_weight"]) == (1.0, 2.0)
    assert all(row["score"] == pytest.approx(row["recall_at_1"] + 1 / row["perplexity"]) for row in rows)
    assert result["best"]["score"] == max(row["score"] for row in rows)

    finished = (tmp_path / "study/trials/1/trial.json").stat().st_mtime_ns
    (tmp_path / "study/trials/0/trial.json").unlink()  # as if killed before it was judged
    assert run_tuning(config)["trials"] == rows
    assert (tmp_path / "study/trials/1/trial.json").stat().st_mtime_ns == finished
    with pytest.raises(BadInput, match=r"holds a study that was begun with another seed. Give the old values"):
        run_tuning(config.model_copy(update={"seed": 5}))
    # A trial that waits holds CPUs too: without room for its workers it would wait for ever.
    crowded = config.model_copy(update={"workers": WorkersConfig(count=4), "out": str(tmp_path / "crowded")})
    with pytest.raises(BadInput, match=r"1 trials at once, with the workers of one, need 4\.5 CPUs"):
        run_tuning(crowded)
    assert not (tmp_path / "crowded").exists()


def test_a_study_goes_on_with_its_own_version_after_a_refresh(
    tmp_path: Path, make_dataset: Callable[..., Dataset], tiny_train: TrainConfig, held_out: str
) -> None:
    root = Path(make_dataset().store.root)
    config = TuneConfig(data=str(root), held_out=held_out, out=str(tmp_path / "study"), train=tiny_train)
    described = config.model_dump(mode="json", exclude={"trials"}) | {"version": 1}
    (tmp_path / "study").mkdir()
    (tmp_path / "study/study.json").write_text(json.dumps(described))
    record = json.loads((root / "versions/1.json").read_text())
    (root / "versions/2.json").write_text(json.dumps(record | {"version": 2, "parent": 1}))

    class RayAsked(Exception):
        pass

    def no_ray() -> None:
        raise RayAsked

    with pytest.raises(RayAsked):
        run_tuning(config, start_ray=no_ray)


def test_a_range_upside_down_is_refused(tiny_train: TrainConfig) -> None:
    values = {"data": "d", "held_out": "h", "out": "o", "smallest_weight": 3.0, "largest_weight": 2.0}
    with pytest.raises(BadInput, match="smallest_weight = 3 is above largest_weight = 2"):
        build_config(TuneConfig, values)


def test_weights_are_seeded_within_bounds_and_start_with_the_recipe(tiny_train: TrainConfig) -> None:
    config = TuneConfig(data="d", held_out="h", out="o", trials=6, seed=3, train=tiny_train)
    drawn = draw_weights(config)
    assert drawn == draw_weights(config)
    assert drawn[0] == tiny_train.loss
    assert all(0.25 <= w <= 4 for loss in drawn[1:] for w in (loss.contrastive_weight, loss.captioning_weight))
    assert len({loss.contrastive_weight for loss in drawn}) == 6
    more = draw_weights(config.model_copy(update={"trials": 8}))
    assert more[:6] == drawn
