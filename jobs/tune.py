"""`coca tune` on Ray Tune: a seeded quasi-random search over the two loss weights."""

import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from coca.config import LossConfig
from coca.dataset import Dataset
from coca.errors import BadInput, RunFailed
from coca.evaluate import evaluate_retrieval, perplexity, read_evaluation_set
from coca.progress import Progress
from coca.run_folder import RunFolder
from coca.storage import Store, open_file
from jobs.config import TrainRunConfig, TuneConfig
from jobs.train import run_training

RESULT = "trial.json"


def run_tuning(config: TuneConfig) -> dict[str, Any]:
    """Train ``config.trials`` short runs that differ in their loss weights; judge each on the held-out set.

    A trial's score is its mean recall@1 of both directions plus exp(-caption loss per token), the geometric mean of the
    probability of a right token: both lie in 0..1 and neither is scaled by the weights. A study started again keeps
    finished trials and resumes the one that was cut off.

    Returns:
        ``trials``: one row each, and ``best``: the row of the highest score.
    """
    read_evaluation_set(config.held_out)
    held_out, name = open_file(config.held_out)
    dataset = Dataset(config.data)
    study = RunFolder(config.out).store
    config = config.model_copy(
        update={
            "data": dataset.store.uri,
            "held_out": f"{held_out.uri}/{name}",
            "out": study.uri,
        }
    )
    _start(study, config, dataset.record.version)
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


def _start(study: Store, config: TuneConfig, version: int) -> None:
    mine = json.dumps({"config": config.model_dump(mode="json", exclude={"trials"}), "version": version}, indent=1)
    if not study.write_once("study.json", mine.encode()) and study.read("study.json").decode() != mine:
        raise BadInput(f"{study.uri} holds a study with another config or dataset version", "Give another --out")


def _fit(config: TuneConfig, version: int) -> list[dict[str, Any]]:
    from ray import tune

    if config.smallest_weight > config.largest_weight:
        raise BadInput(
            f"smallest_weight = {config.smallest_weight} is above largest_weight = {config.largest_weight}",
            "Swap them",
        )
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
            # The trial itself only waits for its workers and then evaluates.
            tune.with_resources(run_trial, {"CPU": 0.5}),
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
    done = threading.Event()
    before = len(_finished_trials(study, trials))
    with Progress("tune", total=trials, unit="trials", start=before) as progress:

        def poll() -> None:
            finished = False
            while not finished:
                finished = done.wait(2.0)
                rows = _finished_trials(study, trials)
                if len(rows) > progress.count:
                    best = max(rows, key=lambda row: row["score"])
                    weights = f"{best['contrastive_weight']:g} : {best['captioning_weight']:g}"
                    progress.advance(len(rows) - progress.count, note=f"best {best['score']:.3f} at {weights}")

        thread = threading.Thread(target=poll, name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


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
        data=config.data,
        version=trial["version"],
        out=f"{folder.root}/run",
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
