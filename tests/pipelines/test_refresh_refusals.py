"""Refreshes that end without a version: strangers in the tables, races, and what does not fit."""

from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable

from coca.errors import BadInput, RunFailed
from coca.storage import Store
from coca.tokenizer import train_bpe
from pipelines.refresh import refresh
from tests.pipelines.test_refresh import Build, pictures


def test_a_stranger_in_the_tables_is_found_out(
    web: Any, pages: Any, refresh_config: Build, without_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines import finish
    from pipelines.tables import DataFile, commit_files

    config = refresh_config(pictures(web, pages, "a", "b"))
    publish = finish.publish_version

    def meanwhile(store: Store, *arguments: Any) -> Any:
        store.write("samples/stranger.parquet", b"bytes")
        commit_files(store, "samples", [DataFile(path="stranger.parquet", size=5, rows=1)], "stranger", 0)
        return publish(store, *arguments)

    monkeypatch.setattr(finish, "publish_version", meanwhile)
    with pytest.raises(RunFailed, match="holds 1 files of others and lacks 0 of ours"):
        refresh(config)
    monkeypatch.setattr(finish, "publish_version", publish)
    assert refresh(config).samples == 2  # the stranger never published: its file is taken out
    assert len(DeltaTable(f"{config.to}/samples").file_uris()) == 1


def test_of_two_racing_refreshes_one_publishes(
    web: Any, pages: Any, refresh_config: Build, without_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = refresh_config(pictures(web, pages, "a", "b"))
    write_once = Store.write_once

    def meanwhile(store: Store, path: str, data: bytes) -> bool:
        if path == "versions/1.json":
            write_once(store, path, b"the other's")
        return write_once(store, path, data)

    monkeypatch.setattr(Store, "write_once", meanwhile)
    with pytest.raises(RunFailed, match="another refresh has published version 1"):
        refresh(config)
    assert Path(config.to, "versions/1.json").read_bytes() == b"the other's"


def test_what_cannot_be_refreshed(
    web: Any, pages: Any, refresh_config: Build, tmp_path: Path, without_ray: None
) -> None:
    pairs = pictures(web, pages, "a")
    with pytest.raises(BadInput, match=r"is new and has no tokenizer yet.*coca tokenizer train"):
        refresh(refresh_config(pairs, tokenizer=None))
    with pytest.raises(BadInput, match=r"cannot read the tokenizer .*nowhere.json"):
        refresh(refresh_config(pairs, tokenizer=str(tmp_path / "nowhere.json")))
    with pytest.raises(BadInput, match="no dataset is given"):
        refresh(refresh_config(pairs, to=""))
    assert not Path(refresh_config(pairs).to).exists()
    refresh(refresh_config(pairs))
    other = tmp_path / "other.json"
    other.write_text(train_bpe(["other words altogether"], 270).to_json())
    with pytest.raises(BadInput, match=r"was written by the tokenizer .*Leave --tokenizer out"):
        refresh(refresh_config(pairs, tokenizer=str(other)))
    with pytest.raises(BadInput, match=r"publish.rows_per_row_group = 5, but .* has 4 for good"):
        refresh(refresh_config(pairs, publish={"rows_per_row_group": 5}))


def test_who_has_lost_the_dataset_sweeps_nothing(
    web: Any, pages: Any, refresh_config: Build, without_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines import refresh as refresh_module

    config = refresh_config(pictures(web, pages, "a"))
    refresh(config)
    store = Store(config.to)
    plan_refresh = refresh_module.plan_refresh

    def taken_over(*arguments: Any, **options: Any) -> Any:
        plan = plan_refresh(*arguments, **options)
        epoch = max(int(name.removesuffix(".json")) for name in store.list("leases"))
        store.write(f"leases/{epoch + 1}.json", store.read(f"leases/{epoch}.json"))
        store.write("staging/the-new-holder/plan.json", b"{}")
        return plan

    monkeypatch.setattr(refresh_module, "plan_refresh", taken_over)
    with pytest.raises(RunFailed, match="taken over"):
        refresh(config)  # nothing is due
    assert store.exists("staging/the-new-holder/plan.json")
