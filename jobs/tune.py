"""`coca tune` on Ray Tune: a seeded quasi-random search over the two loss weights."""

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from coca.errors import BadInput, RunFailed
from coca.evaluate import evaluate_retrieval, perplexity, read_evaluation_set
from coca.progress import Progress, polling
from coca.run_folder import RunFolder
from coca.storage import Store, open_file
from coca.train_config import LossConfig
from jobs.config import DataConfig, TrainRunConfig, TuneConfig
from jobs.train import check_fit, open_mixture, run_training
from jobs.train_checks import check_measures

RESULT, STUDY = "trial.json", "study.json"
TRIAL_CPUS = 0.5  # of the process that waits for a trial's workers and then evaluates


def run_tuning(config: TuneConfig, *, start_ray: Callable[[], object] | None = None) -> dict[str, Any]:
    """Train ``config.trials`` short runs that differ in their loss weights; judge each on the held-out set.

    A trial's score is its mean recall@1 of both directions plus exp(-caption loss per token), the geometric mean of the
    probability of a right token: both lie in 0..1 and neither is scaled by the weights. A study started again keeps
    finished trials and resumes the one that was cut off, on the dataset version it began with.

    Args:
        start_ray: called once everything that can be checked without Ray is; by default Ray is connected already.

    Returns:
        ``trials``: one row each, and ``best``: the row of the highest score.

    Raises:
        BadInput: before any trial starts, for whatever can be known then.
    """
    read_evaluation_set(config.held_out)
    held_out, name = open_file(config.held_out)
    study = RunFolder(config.out).store
    begun = json.loads(study.read(STUDY)) if study.exists(STUDY) else {}
    mixture = open_mixture((DataConfig(uri=config.data),), {"data.0.version": begun.get("version")})
    dataset = mixture.sources[0].dataset
    check_fit(config.train, config.workers, mixture)
    check_measures(TrainRunConfig(data=(DataConfig(uri=config.data),), out=config.out, train=config.train))
    config = config.model_copy(
        update={
            "data": dataset.store.uri,
            "held_out": f"{held_out.uri}/{name}",
            "out": study.uri,
        }
    )
    described = {**config.model_dump(mode="json", exclude={"trials"}), "version": dataset.record.version}
    _check_same_study(study, begun or described, described)
    if start_ray is not None:
        start_ray()
    _check_cluster(config)
    study.write(STUDY, json.dumps(described, indent=1).encode())
    trials = _fit(config, dataset.record.version)
    return {"trials": trials, "best": max(trials, key=lambda row: row["score"])}


def draw_weights(config: TuneConfig) -> list[LossConfig]:
    """The weights of each trial: the recipe's own first, then a scrambled Sobol sequence, logarithmic in both.

    Low-discrepancy points cover two dimensions better than random ones (Bergstra and Bengio 2012, section 5) and,
    unlike an adaptive search, are known beforehand: a killed study goes on with the very trials it had.
    """
    import torch

    points = torch.quasirandom.SobolEngine(2, scramble=True, seed=config.seed).draw(config.trials)
    low, high = math.log(config.smallest_weight), math.log(config.largest_weight)
    drawn = [[round(math.exp(low + value * (high - low)), 4) for value in row] for row in points.tolist()]
    rest = [LossConfig(contrastive_weight=a, captioning_weight=b) for a, b in drawn[: config.trials - 1]]
    return [config.train.loss, *rest]


def _check_same_study(study: Store, begun: dict[str, Any], wanted: dict[str, Any]) -> None:
    differing = [name for name in wanted if begun.get(name) != wanted[name]]
    if differing:
        raise BadInput(
            f"{study.uri} holds a study that was begun with another {' and '.join(differing)}",
            "Give the old values to go on, or another --out for a new study",
        )


def _check_cluster(config: TuneConfig) -> None:
    """A trial without room for its workers would wait for ever."""
    import ray

    cpus = ray.cluster_resources().get("CPU", 0)
    at_once = min(config.concurrent_trials, config.trials)
    wanted = at_once * TRIAL_CPUS + config.workers.count * config.workers.cpus
    if wanted > cpus:
        raise BadInput(
            f"{at_once} trials at once, with the workers of one, need {wanted:g} CPUs, the cluster has {cpus:g}",
            "Lower --workers, workers.cpus or concurrent_trials",
        )


def _fit(config: TuneConfig, version: int) -> list[dict[str, Any]]:
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new output prints its boxes at verbose=0 too
    from ray import tune

    space = [
        {
            "number": number,
            "loss": loss.model_dump(),
            "study": config.model_dump(mode="json"),
            "version": version,
        }
        for number, loss in enumerate(draw_weights(config))
    ]
    study = Store(config.out)
    with _follow(study, len(space)):
        grid = tune.Tuner(
            tune.with_resources(run_trial, {"CPU": TRIAL_CPUS}),
            param_space={"trial": tune.grid_search(space)},
            tune_config=tune.TuneConfig(metric="score", mode="max", max_concurrent_trials=config.concurrent_trials),
            run_config=tune.RunConfig(storage_path=f"{config.out}/ray", verbose=0),
        ).fit()
    if grid.num_errors:
        raise RunFailed(f"{grid.num_errors} of {len(space)} trials failed: {grid.errors[0]}") from grid.errors[0]
    return _finished_trials(study, len(space))


def _finished_trials(study: Store, trials: int) -> list[dict[str, Any]]:
    paths = [f"trials/{number}/{RESULT}" for number in range(trials)]
    return [json.loads(study.read(path)) for path in paths if study.exists(path)]


@contextmanager
def _follow(study: Store, trials: int) -> Iterator[None]:
    """Show progress while the driver waits: a trial is done when its row lies beside its run."""
    before = len(_finished_trials(study, trials))
    with Progress("tune", total=trials, unit="trials", start=before) as progress:

        def poll() -> None:
            rows = _finished_trials(study, trials)
            if len(rows) > progress.count:
                best = max(rows, key=lambda row: row["score"])
                weights = f"{best['contrastive_weight']:g} : {best['captioning_weight']:g}"
                progress.advance(len(rows) - progress.count, note=f"best {best['score']:.3f} at {weights}")

        with polling(poll, every_s=2.0):
            yield


def run_trial(space: dict[str, Any]) -> None:
    """One trial: train, evaluate, keep the row beside its run, report it to Ray Tune."""
    from ray import tune

    trial = space["trial"]
    config = TuneConfig.model_validate(trial["study"])
    folder = Store(f"{config.out}/trials/{trial['number']}")
    if not folder.exists(RESULT):
        folder.write(RESULT, json.dumps(_train_and_judge(config, trial, folder)).encode())
    tune.report(json.loads(folder.read(RESULT)))


def _train_and_judge(config: TuneConfig, trial: dict[str, Any], folder: Store) -> dict[str, Any]:
    from coca.checkpoint import load_checkpoint

    loss = LossConfig.model_validate(trial["loss"])
    run = TrainRunConfig(
        data=(DataConfig(uri=config.data, version=trial["version"]),),
        out=f"{folder.uri}/run",
        workers=config.workers,
        train=config.train.model_copy(update={"loss": loss}),
    )
    result = run_training(run, show_progress=False)
    checkpoint = load_checkpoint(f"{run.out}/{result['checkpoint']}")
    data = read_evaluation_set(config.held_out)
    recalls = evaluate_retrieval(checkpoint, data)
    recall = (recalls["image_to_text_recall_at_1"] + recalls["text_to_image_recall_at_1"]) / 2
    token_perplexity = perplexity(checkpoint, data)
    return {
        "trial": trial["number"],
        "contrastive_weight": loss.contrastive_weight,
        "captioning_weight": loss.captioning_weight,
        "steps": result["steps"],
        "recall_at_1": recall,
        "perplexity": token_perplexity,
        "score": recall + 1 / token_perplexity,
    }
