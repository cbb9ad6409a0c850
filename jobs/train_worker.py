"""What each worker of `coca train` runs under Ray Train, which has initialised torch.distributed."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from jobs.config import TrainRunConfig
from jobs.stop_signal import Listener, StopSignal

if TYPE_CHECKING:
    from coca.decode import Decoder
    from coca.feed import BatchSource
    from coca.held_out import HeldOut
    from coca.mixture import Mixture

Report = Callable[[dict[str, Any]], None]


def train_worker(values: dict[str, Any]) -> dict[str, Any]:
    """
    Args:
        values: ``run`` (a TrainRunConfig as JSON), ``mixture``, ``stop_signal``.
    """
    import ray.train.torch
    import torch

    from coca.distributed import rank
    from coca.run_folder import RunFolder
    from coca.train import train
    from coca.watchdog import Watchdog

    config = TrainRunConfig.model_validate(values["run"])
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(config.workers.threads)
    mixture, signal = values["mixture"], values["stop_signal"]
    signal.join(rank(), ray.get_runtime_context().get_node_id())
    hang_timeout_s = config.workers.hang_timeout_s
    with Watchdog(hang_timeout_s, f"worker {rank()}") as watchdog, hearing(signal) as heard, ExitStack() as stack:
        return train(
            config.train,
            mixture,
            RunFolder(config.out),
            batches=stack.enter_context(closing(feed_of(config, mixture))).batches,
            device=device,
            report=stack.enter_context(reporting(config)),
            should_stop=on_all_ranks(heard, hang_timeout_s),
            held_out=open_held_out(config),
            beat=watchdog.beat,
        )


@contextmanager
def hearing(signal: StopSignal) -> Iterator[Callable[[], bool]]:
    """Whether the signal was given, on rank 0, whose answer counts (`on_all_ranks`); the others ask nobody."""
    from coca.distributed import rank

    if rank() != 0:
        yield lambda: False
        return
    with Listener(signal) as listener:
        yield listener.heard


def on_all_ranks(heard: Callable[[], bool], timeout_s: float) -> Callable[[], bool]:
    """Rank 0's answer, the same on every rank. To be called by all of them, once a step.

    It goes over gloo, also where gradients go over NCCL: the answer is wanted on the CPU, and no step may wait for the
    device.
    """
    import torch
    import torch.distributed as dist

    from coca.distributed import rank, world_size

    if world_size() == 1:
        return heard
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=2 * timeout_s))

    def ask() -> bool:
        answer = torch.tensor([int(rank() == 0 and heard())])
        dist.broadcast(answer, src=0, group=group)
        return bool(answer.item())

    return ask


def feed_of(config: TrainRunConfig, mixture: "Mixture") -> "BatchSource":
    """This rank's batches; pictures are decoded where the config says."""
    from coca.distributed import rank, world_size
    from coca.feeds import open_feed
    from coca.same_run import fit_to_tokenizer

    def make_decoder() -> "Decoder":
        if config.feed.decode == "ray":
            from jobs.ray_decode import RayDecoder

            return RayDecoder(config.feed, config.train.augment, config.train.seed, world_size=world_size())
        from coca import decode

        return decode.make_decoder(config.feed, config.train.augment, config.train.seed)

    train = fit_to_tokenizer(config.train, mixture.tokenizer)
    place = {"rank": rank(), "world_size": world_size()}
    return open_feed(mixture, train, config.feed, make_decoder=make_decoder, **place)


@contextmanager
def reporting(config: TrainRunConfig) -> Iterator[Report]:
    """Takes the rows of metrics.jsonl, on rank 0: for the trackers and Ray's dashboard."""
    from coca.distributed import rank

    if rank() != 0:
        yield lambda row: None
        return
    from jobs.trackers import open_trackers

    with open_trackers(config) as report:
        yield report


def open_held_out(config: TrainRunConfig) -> "HeldOut | None":
    """On rank 0 alone: the others wait while it judges."""
    from coca.distributed import rank

    if config.held_out is None or rank() != 0:
        return None
    from coca.held_out import HeldOut

    return HeldOut(config.held_out, config.held_out_pictures)
