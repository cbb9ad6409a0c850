"""The stages of the demo, in the order data moves. Each can be killed and called again, and goes on."""

import json
import logging
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from coca.errors import RunFailed
from jobs.demo.config import DemoConfig
from jobs.demo.links import Web, make_web

Result = dict[str, Any]
IMAGE_SIZE = 48


@dataclass(frozen=True)
class Folders:
    """Where the stages of one demo keep what they make."""

    out: Path

    @property
    def web(self) -> Web:
        return Web(self.out / "web")

    @property
    def tokenizer(self) -> Path:
        return self.out / "tokenizer.json"

    @property
    def dataset(self) -> Path:
        return self.out / "dataset"

    @property
    def run(self) -> Path:
        return self.out / "run"

    @property
    def study(self) -> Path:
        return self.out / "study"


@dataclass(frozen=True)
class Stage:
    """One stage: what it does for a person, which settings decide its result, and the function that does it."""

    name: str
    title: str
    settings: tuple[str, ...]
    makes: str
    """Folder or file under the demo's that holds what it makes, and goes when its settings change."""
    function: Callable[[Folders, DemoConfig], Result]
    tell: Callable[[Result], str]
    """The result in one line."""


def build_web(folders: Folders, config: DemoConfig) -> Result:
    web = make_web(folders.web.root, config.seed, config.scenes, config.share_two)
    return {**web.expected, "megabytes": round(_size(web.root / "files") / 1e6, 1)}


def train_tokenizer(folders: Folders, config: DemoConfig) -> Result:
    from coca.storage import open_file
    from coca.tokenizer import train_bpe
    from jobs.captions import read_column

    batches = read_column(str(folders.web.links), "caption")
    tokenizer = train_bpe((text for batch in batches for text in batch), config.vocab_size)
    store, name = open_file(str(folders.tokenizer))
    store.write(name, tokenizer.to_json().encode())
    return {"vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint}


def refresh_dataset(folders: Folders, config: DemoConfig) -> Result:
    from jobs.cluster import connect
    from jobs.demo.web import serve_web
    from pipelines.refresh import refresh

    connect()
    with serve_web(folders.web.root):
        result = refresh(refresh_config(folders))
    return asdict(result)


def refresh_config(folders: Folders) -> Any:
    """How the demo's dataset is refreshed: loopback allowed, small pictures, patience for a small web."""
    from coca.images import ImageLimits
    from pipelines.config import PublishConfig, RefreshConfig
    from pipelines.fetch_config import FetchConfig
    from pipelines.image_config import ImageConfig
    from pipelines.links_config import LinksConfig

    return RefreshConfig(
        to=str(folders.dataset),
        tokenizer=str(folders.tokenizer),
        links=LinksConfig(uri=str(folders.web.links)),
        fetch=FetchConfig(
            allow_networks=("127.0.0.0/8",),
            timeout_s=2.0,
            backoff_s=0.2,
            workers=1,
            # One small server of our own is the whole web.
            connections_per_domain=16,
            requests_per_second_per_domain=10_000,
            breaker_failures=1000,
        ),
        image=ImageConfig(
            limits=ImageLimits(min_side=32, max_aspect_ratio=5.0),
            resize="center_crop",
            size=IMAGE_SIZE,
            encode_format="png",
            store_formats=("png",),
        ),
        # Small enough that every lane of the training order owns several row groups.
        publish=PublishConfig(rows_per_row_group=32, links_per_part=512),
    )


def train_model(folders: Folders, config: DemoConfig) -> Result:
    """`coca train` as a Ray job: packed, submitted, followed."""
    from jobs.submit import submit

    words = [
        *("train", "--data", str(folders.dataset), "--out", str(folders.run), "--recipe", "scenes"),
        *("--workers", str(config.workers), "--steps", str(config.steps), "--set", f"train.seed={config.seed}"),
        "--json",
    ]
    last = {"line": ""}

    def show(line: str) -> None:
        if line.startswith("{"):
            last["line"] = line
        elif line.strip():
            click.echo(f"  {line}")

    exit_code = submit(words, working_dir=_code_folder(folders), on_line=show)
    if exit_code:
        raise RunFailed(f"the training job ended with exit code {exit_code}; its log stands above")
    return json.loads(last["line"])


def tune_weights(folders: Folders, config: DemoConfig) -> Result:
    from jobs.cluster import connect
    from jobs.config import TuneConfig
    from jobs.recipes import scenes
    from jobs.tune import run_tuning

    connect()
    train = scenes().model_copy(
        update={"steps": config.trial_steps, "checkpoint_every": config.trial_steps, "seed": config.seed}
    )
    return run_tuning(
        TuneConfig(
            data=str(folders.dataset),
            held_out=str(folders.web.tuning),
            out=str(folders.study),
            trials=config.trials,
            concurrent_trials=2,
            seed=config.seed,
            train=train,
        )
    )


def evaluate_model(folders: Folders, config: DemoConfig) -> Result:
    from coca.checkpoint import load_checkpoint
    from coca.evaluate import (
        evaluate_captions,
        evaluate_classification,
        evaluate_retrieval,
        perplexity,
        read_evaluation_set,
    )
    from jobs.demo.grammar import classification_templates, name_thing
    from jobs.demo.scenes import all_pairs, all_singles, all_things

    checkpoint = load_checkpoint(str(folders.run))
    one = read_evaluation_set(str(folders.web.held_out_one))
    two = read_evaluation_set(str(folders.web.held_out_two))
    captions_one, captions_two = evaluate_captions(checkpoint, one), evaluate_captions(checkpoint, two)
    names = [name_thing(thing) for thing in all_things()]
    return {
        "held_out": captions_one["pictures"],
        "held_out_two_objects": captions_two["pictures"],
        "exact_caption": captions_one["exact_caption"],
        "exact_caption_two_objects": captions_two["exact_caption"],
        # A caption of a kind drawn at random is right for one kind in so many.
        "chance_exact_caption": 1 / len(all_singles()),
        "chance_exact_caption_two_objects": 1 / len(all_pairs()),
        **_without_pictures(evaluate_retrieval(checkpoint, one)),
        **_renamed(evaluate_classification(checkpoint, one, names, classification_templates())),
        "perplexity": perplexity(checkpoint, one),
        "captions": captions_one["captions"],
        "captions_two_objects": captions_two["captions"],
    }


def serve_model(folders: Folders, config: DemoConfig) -> Result:
    """Start the service, ask it over HTTP about pictures no link shows, stop it."""
    from coca.evaluate import read_evaluation_set
    from jobs.cluster import connect
    from jobs.demo.client import ask_service
    from serving import app
    from serving.config import ServeConfig

    one = read_evaluation_set(str(folders.web.held_out_one))
    two = read_evaluation_set(str(folders.web.held_out_two))
    pictures = list(zip([*one.images, *two.images], [*one.captions, *two.captions], strict=True))
    chosen = random.Random(config.seed).sample(range(len(pictures)), config.questions)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    connect()
    service = app.deploy(ServeConfig(checkpoint=str(folders.run), port=0))
    try:
        return {**ask_service(service.url, [pictures[index] for index in chosen]), "pictures": chosen}
    finally:
        app.shutdown()


def _without_pictures(result: Result) -> Result:
    return {name: value for name, value in result.items() if name != "pictures"}


def _renamed(result: Result) -> Result:
    return {"zero_shot_accuracy": result["zero_shot_accuracy"], "chance_zero_shot": result["chance"]}


def _told_weights(trial: Result) -> str:
    return f"{trial['contrastive_weight']:g} : {trial['captioning_weight']:g}"


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _code_folder(folders: Folders) -> Path:
    """What the training job packs: the checkout this code runs from; where it is installed, there is none to pack."""
    checkout = Path(__file__).parents[2]
    if (checkout / "pyproject.toml").exists():
        return checkout
    empty = folders.out / "package"
    empty.mkdir(exist_ok=True)
    return empty


_WEB = ("seed", "scenes", "share_two")
STAGES = (
    Stage(
        name="web",
        title="a small web of pictures with captions",
        settings=_WEB,
        makes="web",
        function=build_web,
        tell=lambda r: f"{r['links']:,} links, {r['samples']:,} of them sound; {r['megabytes']} MB of pictures",
    ),
    Stage(
        name="tokenizer",
        title="a tokenizer trained on its captions",
        settings=("vocab_size",),
        makes="tokenizer.json",
        function=train_tokenizer,
        tell=lambda r: f"{r['vocab_size']} entries",
    ),
    Stage(
        name="refresh",
        title="links to a published dataset, over HTTP",
        settings=(),
        makes="dataset",
        function=refresh_dataset,
        tell=lambda r: f"version {r['version']}: {r['samples']:,} samples, {sum(r['rejected'].values()):,} rejected",
    ),
    Stage(
        name="train",
        title="pretraining on Ray Train, as a Ray job",
        settings=("workers", "steps"),
        makes="run",
        function=train_model,
        tell=lambda r: f"{r['steps']:,} steps with {r['workers']} workers, loss {r['final_loss']:.3f}",
    ),
    Stage(
        name="tune",
        title="a search of the loss weights on Ray Tune",
        settings=("trials", "trial_steps"),
        makes="study",
        function=tune_weights,
        tell=lambda r: f"{len(r['trials'])} trials, best {_told_weights(r['best'])} with {r['best']['score']:.3f}",
    ),
    Stage(
        name="evaluate",
        title="captions, retrieval and classification of unseen scenes",
        settings=(),
        makes="",
        function=evaluate_model,
        tell=lambda r: f"exact {r['exact_caption']:.3f}, with two things {r['exact_caption_two_objects']:.3f}",
    ),
    Stage(
        name="serve",
        title="captions of unseen scenes over HTTP from Ray Serve",
        settings=("questions",),
        makes="",
        function=serve_model,
        tell=lambda r: f"{sum(c['exact'] for c in r['captions'])} of {len(r['captions'])} captions exact",
    ),
)
