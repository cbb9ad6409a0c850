"""Several datasets as one source of samples, by weight; and what has been withdrawn since a run began.

The order of a run is made with the withdrawn list as it stood when the run began. What is withdrawn later keeps its
place in the order and is never read out of it: another sample stands in (`coca.lane_rows`), so all others keep their
step.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from coca.dataset import Dataset
from coca.errors import BadInput
from coca.order import Order
from coca.tokenizer import Tokenizer
from coca.train_config import TrainConfig
from coca.withdrawn import Withdrawn, read_withdrawn

WithdrawnFiles = tuple[str, ...]


class Source(NamedTuple):
    """One dataset of a mixture."""

    dataset: Dataset  # opened with the withdrawn list as it is now
    weight: float = 1.0


class Mixture:
    """Datasets that a run is trained on. Travels to workers, which see the same withdrawn lists."""

    def __init__(self, sources: Sequence[Source], begun_with: Sequence[WithdrawnFiles] | None = None) -> None:
        """
        Args:
            begun_with: of each dataset, the part of the withdrawn list that the order is made with; by default all that
                the dataset was opened with.

        Raises:
            BadInput: the datasets were written by different tokenizers.
        """
        self.sources = tuple(sources)
        self._begun_with = tuple(
            [source.dataset.withdrawn_files for source in self.sources] if begun_with is None else begun_with
        )
        first = self.sources[0].dataset
        for source in self.sources:
            own, wanted = source.dataset.record.tokenizer.fingerprint, first.record.tokenizer.fingerprint
            if own != wanted:
                raise BadInput(
                    f"{source.dataset.store.uri} has tokens of the tokenizer {own}, {first.store.uri} of {wanted}",
                    f"Give it the same: `coca data retokenize {source.dataset.store.uri} --tokenizer"
                    f" {first.store.uri}/{first.record.tokenizer.path}`",
                )

    def __reduce__(self) -> tuple[type["Mixture"], tuple[tuple[Source, ...], tuple[WithdrawnFiles, ...]]]:
        return type(self), (self.sources, self._begun_with)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of all."""
        return self.sources[0].dataset.tokenizer

    def as_begun(self, identity: Mapping[str, Any]) -> "Mixture":
        """The mixture with the order of the run whose ``identity()`` is given; samples withdrawn since are replaced."""
        files = [identity.get(f"data.{place}.withdrawn_files") for place in range(len(self.sources))]
        begun_with = [
            tuple(own) if old is None else tuple(old) for old, own in zip(files, self._begun_with, strict=True)
        ]
        return Mixture(self.sources, begun_with)

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share with the run it continues: plain values by flat names."""
        values: dict[str, Any] = {"data.tokenizer": self.sources[0].dataset.record.tokenizer.fingerprint}
        for place, (source, files) in enumerate(zip(self.sources, self._begun_with, strict=True)):
            values |= {
                f"data.{place}.version": source.dataset.record.version,
                f"data.{place}.row_groups": source.dataset.record.row_groups_sha256,
                f"data.{place}.weight": source.weight,
                f"data.{place}.withdrawn_files": list(files),
            }
        return values

    def provenance(self) -> dict[str, Any]:
        """Where the samples come from, for people and `coca trace`; the first dataset apart as well."""
        datasets = [
            {"dataset": dataset.store.uri, "dataset_version": dataset.record.version, "weight": weight}
            for dataset, weight in self.sources
        ]
        first = datasets[0]
        return {"dataset": first["dataset"], "dataset_version": first["dataset_version"], "datasets": datasets}

    @cached_property
    def ordered(self) -> tuple[Dataset, ...]:
        """The datasets as the order sees them: with the rows that were withdrawn since."""
        return tuple(
            dataset if set(files) == set(dataset.withdrawn_files) else dataset.with_withdrawn(files)
            for (dataset, _), files in zip(self.sources, self._begun_with, strict=True)
        )

    @cached_property
    def later(self) -> tuple[Withdrawn | None, ...]:
        """Of each dataset, what has been withdrawn since the order was made; None for nothing."""
        new = [
            tuple(sorted(set(source.dataset.withdrawn_files) - set(files)))
            for source, files in zip(self.sources, self._begun_with, strict=True)
        ]
        return tuple(
            read_withdrawn(source.dataset.store, files) if files else None
            for source, files in zip(self.sources, new, strict=True)
        )

    @cached_property
    def withdrawn_since(self) -> int:
        """Samples of the order that have been withdrawn since it was made."""
        return sum(
            _selected(ordered) - _selected(source.dataset)
            for source, ordered, later in zip(self.sources, self.ordered, self.later, strict=True)
            if later is not None
        )

    def order(self, config: TrainConfig) -> Order:
        """
        Raises:
            BadInput: config and datasets do not fit each other.
        """
        return Order(
            [dataset.row_groups["selected"].to_numpy().astype(np.int64) for dataset in self.ordered],
            [source.weight for source in self.sources],
            lanes=config.lanes,
            batch_size=config.batch_size,
            window=config.shuffle_window,
            seed=config.seed,
        )


def _selected(dataset: Dataset) -> int:
    return int(dataset.row_groups["selected"].to_numpy().sum())
