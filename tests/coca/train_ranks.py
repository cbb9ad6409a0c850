"""`coca.train.train` on ranks over gloo, as phases of `tests.coca.rank_processes`: no Ray."""

import contextlib
import itertools
from pathlib import Path

import torch

from coca.dataset import Dataset
from coca.decode import make_decoder
from coca.distributed import rank, world_size
from coca.feeds import open_feed
from coca.mixture import Mixture, Source
from coca.run_folder import RunFolder
from coca.same_run import fit_to_tokenizer
from coca.train import train
from coca.train_config import FeedConfig, TrainConfig


def to_the_end(config: str, dataset: str, folder: str) -> None:
    """Into ``folder/<world size>``."""
    _train(config, dataset, Path(folder) / str(world_size()), None)


def begin(config: str, dataset: str, folder: str) -> None:
    """Half of the steps, into ``folder/changed``."""
    _train(config, dataset, Path(folder) / "changed", 0.5)


def go_on(config: str, dataset: str, folder: str) -> None:
    _train(config, dataset, Path(folder) / "changed", None)


def _train(config_json: str, dataset: str, folder: Path, share: float | None) -> None:
    config = TrainConfig.model_validate_json(config_json)
    mixture, feed = Mixture([Source(Dataset(dataset))]), FeedConfig(decode="threads", decode_workers=1)
    folder.mkdir(parents=True, exist_ok=True)
    opened = open_feed(
        mixture,
        fit_to_tokenizer(config, mixture.tokenizer),
        feed,
        rank=rank(),
        world_size=world_size(),
        make_decoder=lambda: make_decoder(feed, config.augment, config.seed),
    )
    steps = itertools.count(1)
    stop_at = None if share is None else round(share * config.steps)
    with contextlib.closing(opened):
        train(
            config,
            mixture,
            RunFolder(folder),
            batches=opened.batches,
            device=torch.device("cpu"),
            should_stop=lambda: next(steps) == stop_at,
        )
