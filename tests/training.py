"""A training run in this process, without Ray."""

import contextlib
from typing import Any

import torch

from coca.dataset import Dataset
from coca.decode import make_decoder
from coca.feed import Feed
from coca.mixture import Mixture, Source
from coca.run_folder import RunFolder
from coca.same_run import fit_to_tokenizer
from coca.train import train
from coca.train_config import FeedConfig, TrainConfig


def train_alone(config: TrainConfig, dataset: Dataset, run: RunFolder, **options: Any) -> dict[str, Any]:
    """What `coca.train.train` returns for one dataset and one process on the CPU."""
    mixture, feed = Mixture([Source(dataset)]), FeedConfig(decode="threads", decode_workers=1)
    decoder = make_decoder(feed, config.augment, config.seed)
    fitted = fit_to_tokenizer(config, mixture.tokenizer)
    with contextlib.closing(Feed(mixture, fitted, feed, rank=0, world_size=1, decoder=decoder)) as source:
        return train(config, mixture, run, batches=source.batches, device=torch.device("cpu"), **options)
