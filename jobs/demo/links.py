"""The generated web on disk: pages, the links table, what should become of it, and what is held out."""

import json
import os
import random
import shutil
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.demo.grammar import caption, captions, name_thing
from jobs.demo.pictures import picture, turned_picture
from jobs.demo.planting import Garden, plant
from jobs.demo.scenes import Scene, Single
from jobs.demo.split import held_out_one, held_out_two, training_scenes, tuning_one
from jobs.demo.web import PORT, write_pages

LINKS, EXPECTED = "links.parquet", "expected.json"
_DONE = "web.json"

# Sound pictures with manners that a downloader must bear: how many of each.
_SLOW, _FAILING_ONCE, _REDIRECTED, _MISLABELLED, _TURNED = 12, 20, 12, 20, 20
# Below the range from which Linux takes the ports of outgoing connections.
_FIRST_PORTS = range(28480, 28490)
_ANY_PORTS = range(20_000, 32_000)


@dataclass(frozen=True)
class Web:
    """A finished web in a folder."""

    root: Path

    @property
    def links(self) -> Path:
        """Parquet with the columns url and caption."""
        return self.root / LINKS

    @property
    def expected(self) -> dict:
        """``links`` (pairs in all), ``samples``, ``rejected`` (reason -> planted pairs)."""
        return json.loads((self.root / EXPECTED).read_text())

    @property
    def held_out_one(self) -> Path:
        """Evaluation set (Parquet: image, captions, label) of scenes with one thing; the label names the thing."""
        return self.root / "held_out_one.parquet"

    @property
    def held_out_two(self) -> Path:
        """Evaluation set (Parquet: image, captions) of scenes with two things."""
        return self.root / "held_out_two.parquet"

    @property
    def tuning(self) -> Path:
        """Evaluation set of further scenes with one thing, to choose settings by."""
        return self.root / "tuning.parquet"


def make_web(root: Path, seed: int = 0, count: int = 3000, share_two: float = 0.3) -> Web:
    """Render a web of ``count`` sound pairs and the planted dirt into ``root``.

    A finished one made with the same arguments is taken as it is. The same arguments give the same files, but for
    the port in the links: a free one is chosen when the folder is first written, and kept.
    """
    made_with = {"seed": seed, "count": count, "share_two": share_two}
    done = root / _DONE
    if done.exists() and json.loads(done.read_text()) == made_with:
        return Web(root)
    root.mkdir(parents=True, exist_ok=True)
    done.unlink(missing_ok=True)
    shutil.rmtree(root / "files", ignore_errors=True)
    web = Web(root)
    _write_web(web, seed, count, share_two)
    _write_evaluation_set(web.held_out_one, held_out_one(seed), random.Random(f"held out one {seed}"))
    _write_evaluation_set(web.held_out_two, held_out_two(seed), random.Random(f"held out two {seed}"))
    _write_evaluation_set(web.tuning, tuning_one(seed), random.Random(f"tuning {seed}"))
    _write_atomically(done, json.dumps(made_with))
    return web


def _write_web(web: Web, seed: int, count: int, share_two: float) -> None:
    garden = Garden(web.root, f"http://127.0.0.1:{_kept_port(web.root)}", seed)
    scenes = training_scenes(seed, count, share_two)
    _add_sound(garden, scenes)
    plant(garden, scenes)
    garden.rng.shuffle(garden.links)
    write_pages(web.root, garden.pages)
    urls, texts = zip(*garden.links, strict=True)
    columns = {"url": pa.array(urls, pa.string()), "caption": pa.array(texts, pa.string())}
    pq.write_table(pa.table(columns), web.links)
    rejected = {reason.value: planted for reason, planted in garden.rejected.items()}
    samples = len(garden.links) - sum(rejected.values())
    expected = {"links": len(garden.links), "samples": samples, "rejected": rejected}
    (web.root / EXPECTED).write_text(json.dumps(expected, indent=2) + "\n")


def _add_sound(garden: Garden, scenes: list[Scene]) -> None:
    """One good link for each scene; some are slow, fail once, redirect, or wear a wrong label."""
    manners = ["slow"] * _SLOW + ["fails"] * _FAILING_ONCE + ["redirect"] * _REDIRECTED
    manners += ["mislabelled"] * _MISLABELLED + ["turned"] * _TURNED
    manners = (manners + ["plain"] * len(scenes))[: len(scenes)]
    for scene, manner in zip(scenes, manners, strict=True):
        garden.add_link(_sound_page(garden, scene, manner), caption(scene, garden.rng))


def _sound_page(garden: Garden, scene: Scene, manner: str) -> str:
    rng = garden.rng
    if manner == "turned":
        return garden.add_picture(turned_picture(scene, rng))
    if manner == "mislabelled":
        return garden.add_page(picture(scene, rng, format="png").data, ".jpg", "image/jpeg")
    if manner == "slow":
        return garden.add_picture(picture(scene, rng), delay_s=rng.uniform(0.2, 0.8))
    if manner == "fails":
        return garden.add_picture(picture(scene, rng), fails_first=1)
    url = garden.add_picture(picture(scene, rng))
    if manner == "redirect":
        return garden.add_page(b"", ".html", "text/html", status=301, headers={"Location": url})
    return url


def _write_evaluation_set(path: Path, scenes: Sequence[Scene], rng: random.Random) -> None:
    columns: dict[str, Any] = {
        "image": pa.array([picture(scene, rng).data for scene in scenes], pa.binary()),
        "captions": pa.array([list(captions(scene)) for scene in scenes], pa.list_(pa.string())),
    }
    labels = [name_thing(scene.thing) for scene in scenes if isinstance(scene, Single)]
    if labels:
        columns["label"] = pa.array(labels, pa.string())
    pq.write_table(pa.table(columns), path)


def _kept_port(root: Path) -> int:
    """The port of this folder: chosen once, so that the urls stay what they are."""
    path = root / PORT
    if not path.exists():
        _write_atomically(path, str(_free_port()))
    return int(path.read_text())


def _free_port() -> int:
    candidates = [*_FIRST_PORTS, *random.SystemRandom().sample(_ANY_PORTS, 200)]
    for port in candidates:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no free port on 127.0.0.1")


def _write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)
