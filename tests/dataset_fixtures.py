"""A published dataset without a pipeline: random pictures, written straight to the data contract."""

import functools
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from coca.config import ModelConfig, TextConfig, ViTConfig
from coca.contract import ANNOTATIONS, ROW_GROUPS, SAMPLES
from coca.dataset import Dataset
from coca.tokenizer import Tokenizer, train_bpe
from coca.train_config import TrainConfig

COLOURS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (30, 60, 200), "white": (240, 240, 240)}
MakeDataset = Callable[..., Dataset]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_bpe([f"a {colour} picture number {n}" for colour in COLOURS for n in range(10)], vocab_size=320)


@pytest.fixture
def make_dataset(tmp_path: Path, tokenizer: Tokenizer, publish_dataset: MakeDataset) -> MakeDataset:
    """``make_dataset(files=[rows, ...], rows_per_row_group=4, unselected=())`` publishes version 1."""
    return functools.partial(publish_dataset, tmp_path / "dataset", tokenizer)


@pytest.fixture(scope="session")
def publish_dataset() -> MakeDataset:
    """The same for any folder and tokenizer: ``publish_dataset(root, tokenizer, ...)``."""

    def make(
        root: Path,
        tokenizer: Tokenizer,
        files: tuple[int, ...] = (10, 10, 10),
        rows_per_row_group: int = 4,
        unselected: tuple[int, ...] = (),
    ) -> Dataset:
        for folder in ("samples", "annotations", "versions", "tokenizers"):
            (root / folder).mkdir(parents=True)
        groups, number = [], 0
        for file, rows in enumerate(files):
            numbers = range(number, number + rows)
            name = f"part-{file:05d}.parquet"
            samples = pa.Table.from_pylist([_sample(n) for n in numbers], schema=SAMPLES)
            notes = [_note(n, tokenizer, n not in unselected) for n in numbers]
            annotations = pa.Table.from_pylist(notes, schema=ANNOTATIONS)
            pq.write_table(samples, root / "samples" / name, row_group_size=rows_per_row_group)
            pq.write_table(annotations, root / "annotations" / name, row_group_size=rows_per_row_group)
            for index, start in enumerate(range(0, rows, rows_per_row_group)):
                inside = notes[start : start + rows_per_row_group]
                groups.append((name, name, index, len(inside), sum(note["selected"] for note in inside)))
            number += rows
        _publish(root, tokenizer, groups, number, number - len(unselected), rows_per_row_group)
        return Dataset(str(root))

    return make


@pytest.fixture
def make_sample() -> Callable[[int], dict[str, object]]:
    """Row ``number`` of the samples table that ``make_dataset`` writes."""
    return _sample


@pytest.fixture(scope="session")
def tiny_model() -> ModelConfig:
    return ModelConfig(
        vision=ViTConfig(image_size=16, patch_size=8, width=16, layers=1, heads=2, mlp_width=32),
        text=TextConfig(
            vocab_size=320,
            context_length=12,
            width=16,
            heads=2,
            mlp_width=32,
            unimodal_layers=2,
            multimodal_layers=2,
        ),
        embed_dim=8,
        caption_queries=3,
        pooler_heads=2,
    )


@pytest.fixture(scope="session")
def tiny_train(tiny_model: ModelConfig) -> TrainConfig:
    return TrainConfig(
        model=tiny_model, steps=6, batch_size=8, lanes=4, shuffle_window=2, log_every=1, checkpoint_every=2
    )


def _sample(number: int) -> dict[str, object]:
    colour = list(COLOURS)[number % len(COLOURS)]
    pixels = np.full((20, 20, 3), COLOURS[colour], dtype=np.uint8)
    pixels[number % 20] = number % 256
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return {
        "sample_id": f"{number:032x}",
        "url": f"http://example.com/{number}",
        "caption": f"a {colour} picture number {number}",
        "image": out.getvalue(),
        "format": "png",
        "width": 20,
        "height": 20,
        "original_width": 20,
        "original_height": 20,
        "source_sha256": hashlib.sha256(out.getvalue()).hexdigest(),
        "sha256": hashlib.sha256(out.getvalue()).hexdigest(),
        "phash": number,
        "fetched_at": 0,
    }


def _note(number: int, tokenizer: Tokenizer, selected: bool) -> dict[str, object]:
    sample = _sample(number)
    return {
        "sample_id": sample["sample_id"],
        "tokens": tokenizer.encode([str(sample["caption"])])[0],
        "language": None,
        "selected": selected,
        "reason": None if selected else "duplicate_image",
    }


def _publish(
    root: Path, tokenizer: Tokenizer, groups: list[tuple], rows: int, selected: int, rows_per_row_group: int
) -> None:
    index = pa.Table.from_pylist(
        [dict(zip(ROW_GROUPS.names, group, strict=True)) for group in groups], schema=ROW_GROUPS
    )
    pq.write_table(index, root / "versions/1.row_groups.parquet")
    tokenizer_path = f"tokenizers/{tokenizer.fingerprint}.json"
    (root / tokenizer_path).write_text(tokenizer.to_json())
    table = {"delta_version": 1, "files": len(groups), "rows": rows}
    record = {
        "version": 1,
        "parent": None,
        "created_at": "2026-01-01T00:00:00+00:00",
        "contract_version": 1,
        "code_version": "test",
        "refresh_id": "test",
        "samples": table,
        "annotations": table,
        "links": table,
        "selected": selected,
        "rows_per_row_group": rows_per_row_group,
        "row_groups_path": "versions/1.row_groups.parquet",
        "row_groups_sha256": hashlib.sha256((root / "versions/1.row_groups.parquet").read_bytes()).hexdigest(),
        "tokenizer": {
            "fingerprint": tokenizer.fingerprint,
            "path": tokenizer_path,
            "vocab_size": tokenizer.vocab_size,
        },
        "withdrawn_sha256": hashlib.sha256(b"").hexdigest(),
        "funnel": {},
        "config": {},
    }
    (root / "versions/1.json").write_text(json.dumps(record))
