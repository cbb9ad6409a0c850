"""Several datasets as one, and a list of withdrawn samples that grows while a run goes on."""

import json
import pickle
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from coca.dataset import Dataset
from coca.decode import make_decoder
from coca.errors import BadInput
from coca.feed import Feed
from coca.mixture import Mixture, Source
from coca.tokenizer import Tokenizer, train_bpe
from coca.train_config import FeedConfig, TrainConfig
from coca.withdrawn import WITHDRAWN, append_withdrawn

MakeDataset = Callable[..., Dataset]


def withdraw(dataset: Dataset, *numbers: int, rows_per_row_group: int = 4, rows_per_file: int = 10) -> None:
    """Put samples of a dataset of `make_dataset` on the list, in an addition of their own."""
    rows = [
        {
            "sample_id": f"{number:032x}",
            "samples_path": f"part-{number // rows_per_file:05d}.parquet",
            "row_group": number % rows_per_file // rows_per_row_group,
            "reason": "takedown",
            "withdrawn_at": 0,
        }
        for number in numbers
    ]
    name = "-".join(["w", *map(str, numbers)])
    assert append_withdrawn(dataset.store, pa.Table.from_pylist(rows, schema=WITHDRAWN), name)


def sample_numbers(mixture: Mixture, config: TrainConfig, batches: int) -> list[list[int]]:
    settings = FeedConfig(decode="threads", decode_workers=1)
    decoder = make_decoder(settings, config.augment, config.seed)
    feed = Feed(mixture, config, settings, rank=0, world_size=1, decoder=decoder)
    numbers = [[int(key, 16) for key in feed.batch(number).sample_ids] for number in range(batches)]
    feed.close()
    return numbers


@pytest.fixture
def resumed(make_dataset: MakeDataset) -> Callable[..., tuple[Mixture, Mixture]]:
    """``resumed(withdrawn)``: a mixture as a run began with it, and as it goes on after samples were withdrawn."""

    def make(withdrawn: tuple[int, ...], before: tuple[int, ...] = ()) -> tuple[Mixture, Mixture]:
        dataset = make_dataset()
        if before:
            withdraw(dataset, *before)
        began = Mixture([Source(Dataset(dataset.store.uri))])
        withdraw(dataset, *withdrawn)
        saved = json.loads(json.dumps(began.identity()))
        return began, Mixture([Source(Dataset(dataset.store.uri))]).as_begun(saved)

    return make


def test_what_was_withdrawn_since_is_replaced_in_place(
    resumed: Callable[..., tuple[Mixture, Mixture]], tiny_train: TrainConfig
) -> None:
    began, goes_on = resumed((5, 7, 28), before=(0, 10))
    assert goes_on.identity() == began.identity()
    assert (began.withdrawn_since, goes_on.withdrawn_since) == (0, 3)
    old, new = sample_numbers(began, tiny_train, 12), sample_numbers(goes_on, tiny_train, 12)
    # Row groups hold 4, 4 and 2 rows of each file of 10: 5 is followed by 6, 7 by 4 in its row group, 28 by 29.
    stands_in = {5: 6, 7: 4, 28: 29}
    assert new == [[stands_in.get(number, number) for number in batch] for batch in old]
    assert {number for batch in old for number in batch} == set(range(30)) - {0, 10}


def test_a_row_group_withdrawn_as_a_whole_is_replaced_by_the_next_of_the_lane(
    resumed: Callable[..., tuple[Mixture, Mixture]], tiny_train: TrainConfig
) -> None:
    gone = {4, 5, 6, 7}
    began, goes_on = resumed(tuple(gone))
    old, new = sample_numbers(began, tiny_train, 12), sample_numbers(goes_on, tiny_train, 12)
    flat_old, flat_new = list(chain.from_iterable(old)), list(chain.from_iterable(new))
    assert gone < set(flat_old)
    assert not gone & set(flat_new)
    changed = [(a, b) for a, b in zip(flat_old, flat_new, strict=True) if a != b]
    assert {a for a, _ in changed} == gone
    # Row group 1 is in lane 1 of 4, together with row group 5, of the samples 18 and 19.
    assert {b for _, b in changed} == {18}


def test_a_lane_of_which_all_is_withdrawn_ends_the_run(
    resumed: Callable[..., tuple[Mixture, Mixture]], tiny_train: TrainConfig
) -> None:
    _, goes_on = resumed((4, 5, 6, 7, 18, 19))
    with pytest.raises(BadInput, match=r"everything that lane 1 reads of .* has been withdrawn .*another --out"):
        sample_numbers(goes_on, tiny_train, 1)


def test_a_new_run_leaves_out_all_that_is_withdrawn(make_dataset: MakeDataset, tiny_train: TrainConfig) -> None:
    dataset = make_dataset()
    withdraw(dataset, 5, 7)
    mixture = Mixture([Source(Dataset(dataset.store.uri))])
    assert mixture.withdrawn_since == 0
    assert {n for batch in sample_numbers(mixture, tiny_train, 12) for n in batch} == set(range(30)) - {5, 7}


def test_samples_that_were_never_selected_do_not_count(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(unselected=(5,))
    began = Mixture([Source(Dataset(dataset.store.uri))])
    withdraw(dataset, 5, 6)
    assert Mixture([Source(Dataset(dataset.store.uri))]).as_begun(began.identity()).withdrawn_since == 1


def test_workers_see_the_lists_of_the_driver(
    resumed: Callable[..., tuple[Mixture, Mixture]], tiny_train: TrainConfig
) -> None:
    _, goes_on = resumed((5, 7))
    pickled = pickle.dumps(goes_on)
    withdraw(goes_on.sources[0].dataset, 6)
    worker = pickle.loads(pickled)
    assert worker.identity() == goes_on.identity()
    assert worker.withdrawn_since == 2
    assert sample_numbers(worker, tiny_train, 6) == sample_numbers(goes_on, tiny_train, 6)


def test_what_a_resumed_run_must_share(tmp_path: Path, tokenizer: Tokenizer, publish_dataset: MakeDataset) -> None:
    one, other = (publish_dataset(tmp_path / name, tokenizer, (10,)) for name in ("one", "other"))
    withdraw(other, 3)
    mixture = Mixture([Source(one, 2.0), Source(Dataset(other.store.uri), 1.0)])
    assert mixture.identity() == {
        "data.tokenizer": tokenizer.fingerprint,
        "data.0.version": 1,
        "data.0.row_groups": one.record.row_groups_sha256,
        "data.0.weight": 2.0,
        "data.0.withdrawn_files": [],
        "data.1.version": 1,
        "data.1.row_groups": other.record.row_groups_sha256,
        "data.1.weight": 1.0,
        "data.1.withdrawn_files": ["w-3.parquet"],
    }
    assert mixture.provenance() == {
        "dataset": one.store.uri,
        "dataset_version": 1,
        "datasets": [
            {"dataset": one.store.uri, "dataset_version": 1, "weight": 2.0},
            {"dataset": other.store.uri, "dataset_version": 1, "weight": 1.0},
        ],
    }
    # A run of one dataset that goes on with two: nothing to begin the second with, and the identities differ.
    assert mixture.as_begun(Mixture([Source(one)]).identity()).identity() == mixture.identity()


def test_datasets_of_different_tokenizers_are_refused(
    tmp_path: Path, tokenizer: Tokenizer, publish_dataset: MakeDataset
) -> None:
    one = publish_dataset(tmp_path / "one", tokenizer, (10,))
    other = publish_dataset(tmp_path / "other", train_bpe(["something else"] * 9, vocab_size=300), (10,))
    expected = (
        rf"{other.store.uri} has tokens of the tokenizer \w+, {one.store.uri} of \w+. Give it the same: `coca data"
    )
    with pytest.raises(BadInput, match=rf"{expected} retokenize {other.store.uri} --tokenizer {one.store.uri}/tok"):
        Mixture([Source(one), Source(other)])


def test_the_order_of_one_dataset_is_what_it_always_was(make_dataset: MakeDataset, tiny_train: TrainConfig) -> None:
    order = Mixture([Source(make_dataset(unselected=(2,)), 17.0)]).order(tiny_train)
    counts = np.array([3, 4, 2, 4, 4, 2, 4, 4, 2])
    assert [lane.samples_per_pass for lane in order.lanes] == [int(counts[lane::4].sum()) for lane in range(4)]
    assert [[tuple(ref) for ref in order.lane_batch(lane, 5)] for lane in range(4)] == GOLDEN


GOLDEN = [[(0, 0, 1), (8, 0, 1)], [(1, 2, 1), (1, 3, 1)], [(2, 0, 1), (6, 3, 1)], [(3, 1, 1), (3, 0, 1)]]
