"""Where the settings of a refresh come from, and which of them wins."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coca.dataset import Dataset
from coca.errors import BadInput
from jobs.refresh_settings import resolve_refresh
from pipelines.presets import preset


def test_a_preset_stands_below_the_file_and_the_flags(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("judge: {min_words: 7}\nimage: {size: 128}\n")
    coyo = preset("coyo").settings
    config = resolve_refresh("coyo", file, ["judge.max_words=99"])
    assert (config.preset, config.judge.min_words, config.judge.max_words, config.image.size) == ("coyo", 7, 99, 128)
    assert config.image.limits.min_side == coyo["image"]["limits"]["min_side"]


def test_a_preset_may_be_named_in_the_file_and_the_flag_wins(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("preset: coyo\n")
    assert resolve_refresh(None, file, []) == resolve_refresh("coyo", None, [])
    assert resolve_refresh("align", file, []) == resolve_refresh("align", None, [])
    with pytest.raises(BadInput, match=r"no preset 'cojo'.*Did you mean 'coyo'"):
        resolve_refresh("cojo", None, [])


def test_what_a_dataset_has_selected_by_holds_against_a_preset(
    tmp_path: Path, make_dataset: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make_dataset()
    record = dataset.record
    chosen: dict[str, Any] = {"duplicates": "perceptual", "min_words": 4}
    path = Path(dataset.store.path("versions/1.json"))
    path.write_text(record.model_copy(update={"config": {"select": chosen}}).model_dump_json())
    uri = dataset.store.uri
    config = resolve_refresh("laion400m", None, [], uri)
    assert (config.select.duplicates, config.select.min_words) == ("perceptual", 4)
    config = resolve_refresh("laion400m", None, [f"to={uri}", "select.duplicates=exact"])
    assert (config.select.duplicates, config.select.min_words) == ("exact", 4)
    assert (
        resolve_refresh("laion400m", None, []).select.duplicates == preset("laion400m").settings["select"]["duplicates"]
    )
