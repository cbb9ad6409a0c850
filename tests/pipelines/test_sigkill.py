"""SIGKILL to the driver, an actor, a decoder, while somebody reads; test_resume.py has the kills at every write."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.config import RefreshConfig
from pipelines.refresh import refresh
from tests.pipelines.killing import (
    SLOW,
    Chaos,
    Cluster,
    Command,
    Reader,
    copy_dataset,
    kill_driver,
    links,
    published,
    soak,
    wait_until,
)

Build = Callable[..., RefreshConfig]


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_sigkill_of_the_driver_an_actor_and_a_decoder(
    web: Any, pages: Any, refresh_config: Build, ray_cluster: Any, tmp_path: Path
) -> None:
    base = refresh_config([("/base", "in the first version")])
    web.pages["/base"] = pages.image("base")
    refresh(base)
    pairs = links(web, pages, 40, delay_s=0.2)
    config = refresh_config(pairs, publish={"links_per_part": 10, "links_per_batch": 30}, fetch=SLOW)
    undisturbed = config.model_copy(update={"to": f"{config.to}-undisturbed"})
    copy_dataset(base.to, undisturbed.to)
    refresh(undisturbed)
    command, web_before = Command(config, tmp_path, RAY_ADDRESS=ray_cluster.address), sum(web.requests.values())
    with Reader(config.to) as reader:
        process = command.start()
        assert wait_until(lambda: sum(web.requests.values()) >= web_before + 8, process)
        assert kill_driver(process)
        chaos = Chaos(Cluster(ray_cluster.address), random.Random(1), within_s=0.2)
        chaos.run(command, ["actor", "decoder"], 0)
    assert chaos.kills.total() == 2
    assert published(config.to) == published(undisturbed.to)
    assert (reader.failures, sorted(reader.rows), reader.rounds > 10) == ([], [1, 2], True)


@pytest.mark.soak
@pytest.mark.ray
@pytest.mark.timeout(3600)
def test_sigkill_at_any_moment(
    web: Any, pages: Any, refresh_config: Build, ray_cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At least 15 kills on local disk."""
    soak(refresh_config, web, pages, str(tmp_path / "soak"), ray_cluster.address, tmp_path, capsys)
