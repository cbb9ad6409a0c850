"""What saving costs a run: for how long a checkpoint holds the loop, and how much slower steps are while it is written.

Trains a model of --parameters with the real training loop on made-up batches, on one CPU process or several over gloo,
with one checkpoint at its end and with one every --every steps, in turns. Prints a JSON row:

  pause_s          seconds for which a save held the loop: the weights gathered for use, the state copied
  pause_share      of the time on steps; at the cadence of the run, and at one checkpoint in ten minutes
  slower           time of a step with checkpoints over one without, the pauses included: on CPUs the thread that writes
                   and the training share them; of pairs of runs

Run: python benchmarks/checkpoint_pause.py [--parameters 100] [--steps 25] [--every 6] [--workers 1]
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from coca.checkpoint import checkpoint_path
from coca.config import ModelConfig, TextConfig, ViTConfig
from coca.cost import meta_model
from coca.dataset import Dataset
from coca.distributed import rank
from coca.mixture import Mixture, Source
from coca.mock_feed import MockFeed
from coca.run_folder import RunFolder
from coca.same_run import fit_to_tokenizer
from coca.tokenizer import train_bpe
from coca.train import train
from coca.train_config import ParallelConfig, TrainConfig
from tests.coca.rank_processes import run_phases
from tests.stored_dataset import publish, row

TEN_MINUTES_S, BATCH, WIDTH = 600, 8, 768
Rows = list[dict[str, Any]]
"""Of metrics.jsonl, one for each step."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=100, help="millions, about")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--every", type=int, default=6)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--parallel", choices=["ddp", "fsdp"], default="ddp")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    if 2 * options.every >= options.steps:
        parser.error(f"--every {options.every} makes no two checkpoints on the way of --steps {options.steps}")
    config = config_of(options)
    with tempfile.TemporaryDirectory() as folder:
        dataset = publish(Path(folder) / "dataset", train_bpe(["a picture"], vocab_size=300), *files(), config={})
        runs: dict[int, list[Rows]] = {options.steps: [], options.every: []}  # one at the end, or more
        for number in range(options.rounds):
            for every in list(runs) if number % 2 == 0 else reversed(runs):
                changed = config.model_copy(update={"checkpoint_every": every})
                out = str(Path(folder) / f"run-{number}-{every}")
                arguments = (changed.model_dump_json(), dataset.store.uri, out)
                ranks = options.workers if options.workers > 1 else 0
                run_phases("benchmarks.checkpoint_pause", [("train_rank", ranks)], *arguments)
                runs[every].append(RunFolder(out).read_metrics())
        newest = Path(out) / checkpoint_path(options.steps)
        checkpoint_gb = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file()) / 1e9
    print(json.dumps(row_of(options, config, runs) | {"checkpoint_gb": round(checkpoint_gb, 2)}))


def files() -> list[list[dict[str, Any]]]:
    return [[row(f"{place}-{number}", "a picture") for number in range(4)] for place in range(2)]


def config_of(options: argparse.Namespace) -> TrainConfig:
    """As many layers as make the parameters."""
    for layers in range(1, 200):
        text = TextConfig(
            vocab_size=300,
            context_length=16,
            width=WIDTH,
            heads=12,
            mlp_width=4 * WIDTH,
            unimodal_layers=layers,
            multimodal_layers=layers,
        )
        vision = ViTConfig(image_size=64, patch_size=16, width=WIDTH, layers=layers, heads=12, mlp_width=4 * WIDTH)
        model = ModelConfig(vision=vision, text=text, embed_dim=WIDTH, pooler_heads=12)
        if sum(p.numel() for p in meta_model(model).parameters()) >= options.parameters * 1e6:
            break
    return TrainConfig(
        model=model,
        batch_size=BATCH,
        lanes=2,
        steps=options.steps,
        log_every=1,
        parallel=ParallelConfig(kind=options.parallel),
    )


def train_rank(fields: str, uri: str, out: str) -> None:
    """One rank's run; its numbers are in the run folder."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // max(1, world())))
    mixture = Mixture([Source(Dataset(uri))])
    config = fit_to_tokenizer(TrainConfig.model_validate_json(fields), mixture.tokenizer)
    feed = MockFeed(config, rank=rank(), world_size=world())
    train(config, mixture, RunFolder(out), batches=feed.batches, device=torch.device("cpu"))


def world() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def row_of(options: argparse.Namespace, config: TrainConfig, runs: dict[int, list[Rows]]) -> dict[str, Any]:
    alone, beside = runs[options.steps], runs[options.every]
    alone_s = statistics.median(step for rows in alone for step in step_times(rows))
    pauses_s = [pauses(rows, options.every) for rows in beside]
    later_s = statistics.median(pause for of_run in pauses_s for pause in of_run[1:])
    slower = [mean_step(with_) / mean_step(without) for with_, without in zip(beside, alone, strict=True)]
    return {
        "benchmark": "pause of a checkpoint",
        "parameters_m": round(sum(p.numel() for p in meta_model(config.model).parameters()) / 1e6, 1),
        "workers": options.workers,
        "parallel": options.parallel,
        "step_s": round(alone_s, 2),
        "every_steps": options.every,
        "first_pause_s": round(statistics.median(of_run[0] for of_run in pauses_s), 3),
        "pause_s": round(later_s, 3),
        "pause_share": round(later_s / (options.every * alone_s), 4),
        "pause_share_at_ten_minutes": round(later_s / TEN_MINUTES_S, 5),
        "share_bar": 0.02,
        "slower": round(statistics.median(slower), 3),
        "load": round(os.getloadavg()[0], 1),
    }


def pauses(rows: Rows, every: int) -> list[float]:
    """Of each checkpoint on the way. The weights are gathered before the row of its step, the state copied after it."""
    held = {row["step"]: row["checkpoint_pause_s"] for row in rows}
    return [held[step] + held[step + 1] for step in range(every, len(rows), every)]


def step_times(rows: Rows) -> list[float]:
    """Seconds from row to row, behind the first, which warms up."""
    return [later - earlier for earlier, later in itertools.pairwise(row["wall_s"] for row in rows[1:])]


def mean_step(rows: Rows) -> float:
    return statistics.mean(step_times(rows))


if __name__ == "__main__":
    main()
