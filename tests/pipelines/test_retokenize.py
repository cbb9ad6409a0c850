"""Other tokens: a new version, and nothing else in it changes."""

from pathlib import Path
from typing import Any

import pytest

from coca.dataset import Dataset, list_versions
from coca.errors import RunFailed
from coca.tokenizer import Tokenizer, train_bpe, train_unigram
from pipelines.retokenize import retokenize_dataset
from tests.stored_dataset import annotations, publish, row, snapshot

OTHER = train_bpe(["a picture of things", "other words"], vocab_size=290)


@pytest.fixture
def dataset(tmp_path: Path, tokenizer: Tokenizer) -> Dataset:
    rows = [row(f"n{n}", f"a picture of {n} things", language=None if n == 2 else "en") for n in range(6)]
    scored = row("s", "scored", scores=[("likeness", 0.5)], selected=False, reason="score")
    return publish(tmp_path / "data", tokenizer, rows, [scored], config={"judge": {}})


def test_tokens_change_and_nothing_else(dataset: Dataset, tokenizer: Tokenizer) -> None:
    root = Path(dataset.store.uri)
    before, files = annotations(dataset), snapshot(root, "samples", "annotations", "links", "tokenizers")
    result = retokenize_dataset(str(root), OTHER)
    opened = Dataset(str(root))
    after = annotations(opened)
    assert opened.tokenizer.fingerprint == result.fingerprint == OTHER.fingerprint
    for caption, note in after.items():
        assert note == {**before[caption], "tokens": OTHER.encode([caption])[0]}
    record = opened.record
    assert (record.kind, record.parent, record.version, record.selected) == ("retokenize", 1, 2, 6)
    assert (record.samples, record.links) == (dataset.record.samples, dataset.record.links)
    assert record.config == dataset.record.config
    assert result.tokens == sum(len(note["tokens"]) for note in after.values())
    assert result.tokens_before == sum(len(note["tokens"]) for note in before.values())
    now = snapshot(root, "samples", "annotations", "links", "tokenizers")
    assert {path: now[path] for path in files} == files
    assert Dataset(str(root), 1).tokenizer.fingerprint == tokenizer.fingerprint


def test_the_same_tokenizer_changes_nothing_and_there_is_a_way_back(dataset: Dataset, tokenizer: Tokenizer) -> None:
    uri, before = dataset.store.uri, annotations(dataset)
    assert not retokenize_dataset(uri, tokenizer).changed
    retokenize_dataset(uri, train_unigram(["a picture of things", "other words"] * 9, vocab_size=290))
    assert annotations(Dataset(uri)) != before
    assert retokenize_dataset(uri, tokenizer).version == 3
    assert annotations(Dataset(uri)) == before


def test_a_killed_one_goes_on(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*args: Any, **options: Any) -> Any:
        raise RunFailed("killed")

    with monkeypatch.context() as patch:
        patch.setattr("pipelines.retokenize.publish_next", killed)
        with pytest.raises(RunFailed, match="killed"):
            retokenize_dataset(dataset.store.uri, OTHER)
    assert list_versions(dataset.store) == [1]
    assert retokenize_dataset(dataset.store.uri, OTHER).version == 2
    assert annotations(Dataset(dataset.store.uri))["scored"]["tokens"] == OTHER.encode(["scored"])[0]
