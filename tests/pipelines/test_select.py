"""Selecting anew: other thresholds make a new version, and samples and requests have no part in it."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from coca.contract import Reason
from coca.dataset import Dataset, list_versions
from coca.errors import BadInput, RunFailed
from coca.storage import Store
from coca.tokenizer import Tokenizer
from coca.withdrawn import WITHDRAWN, append_withdrawn
from pipelines.scorer import ScoreFiles, ScorerSpec
from pipelines.select import SelectResult, select_dataset
from pipelines.select_config import SelectConfig
from pipelines.tables import commit_files, open_table, read_data_files, table_files
from tests.stored_dataset import annotations, picture, publish, row, snapshot

CONFIG = {
    "judge": {"min_words": 1, "max_words": 256, "min_chars": 3, "max_chars": 1000, "languages": []},
    "image": {"limits": {"min_side": 32, "max_aspect_ratio": 5.0}},
    "select": SelectConfig().model_dump(mode="json"),
}


@pytest.fixture
def dataset(tmp_path: Path, tokenizer: Tokenizer) -> Dataset:
    same = picture("twin")
    first = [row(f"n{n}", f"a picture of {n} things") for n in range(5)]
    copies = [row("twin-a", "twin a", same), row("twin-b", "twin b", same, selected=False, reason="duplicate_image")]
    near = [row("changed", "near one", picture("near")), row("jpeg", "near two", picture("near", quality=80))]
    return publish(tmp_path / "data", tokenizer, first, [*copies, *near, row("short", "word")], config=CONFIG)


def refused(dataset: Dataset) -> dict[str, str]:
    notes = annotations(Dataset(dataset.store.uri))
    assert all(note["selected"] == (note["reason"] is None) for note in notes.values())
    return {caption: note["reason"] for caption, note in notes.items() if note["reason"]}


def select(dataset: Dataset, **settings: Any) -> SelectResult:
    return select_dataset(dataset.store.uri, SelectConfig(**settings))


def twin_loser() -> str:
    ids = {caption: row(f"twin-{caption[-1]}", caption)["sample_id"] for caption in ("twin a", "twin b")}
    return max(ids, key=lambda caption: ids[caption])


def test_a_changed_threshold_is_a_new_version_and_rewrites_no_sample(dataset: Dataset) -> None:
    root = Path(dataset.store.uri)
    before, notes_before = snapshot(root, "samples", "annotations"), annotations(dataset)
    result = select(dataset, min_words=2)
    assert refused(dataset) == {twin_loser(): "duplicate_image", "word": "caption_too_short"}
    assert (result.version, result.changed, result.stored, result.selected) == (2, True, 10, 8)
    assert result.rejected == {"duplicate_image": 1, "caption_too_short": 1}
    after = snapshot(root, "samples", "annotations")
    assert {path: after[path] for path in before} == before
    assert not [path for path in after.keys() - before.keys() if path.startswith("samples/")]
    record = Dataset(str(root)).record
    assert (record.kind, record.parent, record.samples) == ("select", 1, dataset.record.samples)
    assert record.config == {**CONFIG, "select": SelectConfig(min_words=2).model_dump(mode="json")}
    assert record.selected == 8
    assert not (root / "staging").exists() or not any((root / "staging").iterdir())
    for caption, note in annotations(Dataset(str(root))).items():
        kept = {name: note[name] for name in ("sample_id", "tokens", "language", "scores")}
        assert kept == {name: notes_before[caption][name] for name in kept}
    # The older version is still itself.
    assert annotations(Dataset(str(root), 1)) == notes_before


def test_loosening_brings_back_what_is_stored(dataset: Dataset) -> None:
    select(dataset, min_words=2, duplicates="perceptual")
    assert len(refused(dataset)) == 3
    result = select(dataset)
    assert refused(dataset) == {twin_loser(): "duplicate_image"}
    assert (result.version, result.selected, result.verdicts_changed) == (3, 9, 2)
    assert select(dataset, duplicates="none").selected == 10


def test_the_same_settings_again_change_nothing(dataset: Dataset) -> None:
    first = select(dataset, min_words=2)
    again = select(dataset, min_words=2)
    assert (again.version, again.changed, again.rejected) == (2, False, first.rejected)
    assert list_versions(dataset.store) == [1, 2]


def test_the_ledger_follows(dataset: Dataset) -> None:
    result = select(dataset, min_words=2, duplicates="perceptual")
    record = Dataset(dataset.store.uri).record
    columns = ["sample_id", "caption", "reason", "state", "stored", "etag", "refresh_id", "next_check_at", "attempts"]
    files = table_files(open_table(dataset.store, "links", record.links.delta_version))
    events = read_data_files(dataset.store, "links", sorted(files), columns).to_pylist()
    assert len(events) == record.links.rows == 10 + result.verdicts_changed
    new = {event["caption"]: event for event in events if event["refresh_id"] != "first"}
    lost = refused(dataset)
    expected = {caption: reason for caption, reason in lost.items() if caption != "twin b"}
    if twin_loser() == "twin a":
        expected["twin b"] = None
    assert {caption: event["reason"] for caption, event in new.items()} == expected
    for event in new.values():
        assert (event["stored"], event["etag"], event["attempts"]) == (True, "abc", 0)
        assert event["next_check_at"] is not None
    assert all(event["state"] == ("changed" if caption == "near one" else "ok") for caption, event in new.items())


def test_withdrawn_rows_neither_win_nor_are_selected(dataset: Dataset) -> None:
    winner = ({"twin a", "twin b"} - {twin_loser()}).pop()
    gone = row(f"twin-{winner[-1]}", winner)["sample_id"]
    name = "first-p00001.parquet"
    entry = {"sample_id": gone, "samples_path": name, "row_group": 0, "reason": "opted_out"}
    rows = pa.Table.from_pylist([{**entry, "withdrawn_at": datetime.now(UTC)}], schema=WITHDRAWN)
    append_withdrawn(dataset.store, rows, "takedown")
    result = select(dataset)
    assert refused(dataset) == {winner: "withdrawn"}
    assert result.rejected == {"withdrawn": 1}
    opened = Dataset(dataset.store.uri)
    assert opened.record.withdrawn_sha256 == opened.withdrawn.digest != dataset.record.withdrawn_sha256
    assert sum(opened.row_groups["selected"].to_pylist()) == 9


def test_loosening_below_what_was_admitted_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    judge = {**CONFIG["judge"], "min_words": 3, "max_chars": 50, "languages": ["en", "de"]}
    config = {**CONFIG, "judge": judge}
    dataset = publish(tmp_path / "data", tokenizer, [row("a", "three words here")], config=config)
    for settings, named in (
        ({"min_words": 2}, "select.min_words = 2 is looser .* judge.min_words = 3"),
        ({"max_chars": 51}, "judge.max_chars = 50"),
        ({"min_side": 31}, "image.limits.min_side = 32"),
        ({"max_aspect_ratio": 6.0}, "image.limits.max_aspect_ratio = 5"),
        ({"languages": ("en", "fr")}, "select.languages holds fr"),
    ):
        with pytest.raises(BadInput, match=named) as refusal:
            select(dataset, **settings)
        assert "Refresh the dataset" in str(refusal.value)
    assert list_versions(dataset.store) == [1]
    assert select(dataset, min_words=3, max_chars=50, min_side=32, languages=("en",)).selected == 1


@pytest.mark.parametrize("step", ["replace_annotations", "write_verdicts", "publish_next"])
def test_a_killed_selection_goes_on(dataset: Dataset, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    import pipelines.select as module

    original = getattr(module, step)

    def killed(*args: Any, **options: Any) -> Any:
        if step != "publish_next":
            original(*args, **options)
        raise RunFailed("killed")

    with monkeypatch.context() as patch:
        patch.setattr(module, step, killed)
        with pytest.raises(RunFailed, match="killed"):
            select(dataset, min_words=2)
    assert list_versions(dataset.store) == [1]
    assert refused(dataset) == {"twin b": "duplicate_image"}
    result = select(dataset, min_words=2)
    assert refused(dataset) == {twin_loser(): "duplicate_image", "word": "caption_too_short"}
    record = Dataset(dataset.store.uri).record
    assert record.links.rows == 10 + result.verdicts_changed
    assert record.annotations.rows == 10


def test_what_a_killed_refresh_left_is_in_no_version(dataset: Dataset) -> None:
    """Its events go; its samples stay outside, as the record names the samples of the parent."""
    from pipelines.publish import write_events
    from pipelines.tables import read_data_files

    first = read_data_files(dataset.store, "links", sorted(_paths(dataset, "links"))[:1])
    files = write_events(dataset.store, first, "other", "other-b00000")
    commit_files(dataset.store, "links", files, "other", 0)
    result = select(dataset, min_words=2)
    assert Dataset(dataset.store.uri).record.links.rows == 10 + result.verdicts_changed


def _paths(dataset: Dataset, name: str) -> list[str]:
    from pipelines.tables import table_files

    return list(table_files(open_table(dataset.store, name)))


class Brightness:
    """A scorer that can be checked by hand, with a gap."""

    def __init__(self, scale: float) -> None:
        self._scale = scale

    def score(self, images: list[np.ndarray], captions: list[str]) -> dict[str, np.ndarray]:
        values = [
            np.nan if "3" in text else image.mean() * self._scale for image, text in zip(images, captions, strict=True)
        ]
        return {"brightness": np.array(values, dtype=np.float32), "words": np.array([len(c.split()) for c in captions])}


SPEC = ScorerSpec(Brightness, source="test:brightness", arguments={"scale": 1 / 255}, batch_size=3)


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def score_parts(store: Store, paths: list[str], spec: ScorerSpec, folder: str, start_ray: object) -> None:
        ScoreFiles(store, spec, folder)({"path": paths})

    monkeypatch.setattr("pipelines.select.score_parts", score_parts)


def check_scores(dataset: Dataset) -> None:
    from coca.images import ImageLimits, decode_rgb

    opened = Dataset(dataset.store.uri)
    assert opened.record.config["scorers"] == ["test:brightness"]
    notes = annotations(opened)
    means = {}
    for index in range(opened.row_groups.num_rows):
        for sample in opened.read_row_group(index, only_selected=False).to_pylist():
            means[sample["caption"]] = np.asarray(decode_rgb(sample["image"], ImageLimits())).mean() / 255
    for caption, note in notes.items():
        scores = dict(note["scores"])
        assert scores["words"] == len(caption.split())
        assert ("brightness" in scores) == ("3" not in caption)
        if "brightness" in scores:
            assert scores["brightness"] == pytest.approx(means[caption], abs=1e-6)
        low = scores.get("brightness", -1.0) < 0.5
        assert (note["reason"] == "score") == low, caption


def test_scores_become_annotations_and_thresholds(dataset: Dataset, without_ray: None) -> None:
    config = SelectConfig(duplicates="none", min_scores={"brightness": 0.5})
    result = select_dataset(dataset.store.uri, config, scorers=[SPEC])
    check_scores(dataset)
    assert 0 < result.selected < 10
    # Kept, so that a later selection needs no scorer.
    again = select(dataset, duplicates="none", min_scores={"brightness": 0.4})
    assert again.selected > result.selected
    assert select(dataset, min_scores={}).selected == 9


def test_a_score_that_nobody_has_is_refused(dataset: Dataset) -> None:
    with pytest.raises(BadInput, match="'nsfw', a score that no stored pair has"):
        select(dataset, min_scores={"nsfw": 0.5})
    assert list_versions(dataset.store) == [1]


def test_a_list_of_evaluation_pictures(dataset: Dataset, tmp_path: Path) -> None:
    known = row("n0", "a picture of 0 things")
    (tmp_path / "list.txt").write_text(f"# pictures\n{known['source_sha256'].upper()}\n")
    select(dataset, duplicates="none", contaminants=(str(tmp_path / "list.txt"),))
    assert refused(dataset) == {"a picture of 0 things": Reason.CONTAMINATED.value}


@pytest.mark.ray
def test_as_ray_jobs(dataset: Dataset, ray_cluster: object) -> None:
    config = SelectConfig(duplicates="none", min_scores={"brightness": 0.5})
    select_dataset(dataset.store.uri, config, scorers=[SPEC], start_ray=lambda: None, in_process_rows=4)
    check_scores(dataset)
    assert set(refused(dataset).values()) == {"score"}


def test_on_s3(s3: str, tokenizer: Tokenizer) -> None:
    opened = publish(f"{s3}/data", tokenizer, [row("a", "one"), row("b", "two words")], config=CONFIG)
    assert select(opened, min_words=2).rejected == {"caption_too_short": 1}
    assert refused(opened) == {"one": "caption_too_short"}
