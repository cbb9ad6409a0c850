"""The held-out set: as the evaluation of a checkpoint, on a model in training, which it leaves alone."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from coca.checkpoint import Checkpoint
from coca.config import ModelConfig, Preprocessing
from coca.errors import BadInput
from coca.evaluate import caption_loss, evaluate_retrieval, read_evaluation_set, write_captions
from coca.feed import pad_tokens
from coca.held_out import HeldOut, read_evaluations
from coca.model import CoCa
from coca.objective import Objective
from coca.storage import Store
from coca.tokenizer import Tokenizer
from coca.train_config import LossConfig

pytestmark = pytest.mark.usefixtures("one_thread")

PREPROCESSING = Preprocessing(image_size=16)


@pytest.fixture
def model(tiny_model: ModelConfig) -> CoCa:
    torch.manual_seed(0)
    return CoCa(tiny_model)


@pytest.fixture
def held_out_file(tmp_path: Path, make_sample: Callable[[int], dict[str, Any]]) -> str:
    samples = [make_sample(n) for n in range(20)]
    captions = [[str(s["caption"]), f"a second caption {n}"] for n, s in enumerate(samples)]
    pq.write_table(pa.table({"image": [s["image"] for s in samples], "captions": captions}), tmp_path / "held.parquet")
    return str(tmp_path / "held.parquet")


def test_measures_are_those_of_the_checkpoint_on_the_first_pictures(
    model: CoCa, tokenizer: Tokenizer, held_out_file: str
) -> None:
    held_out = HeldOut(held_out_file, 18)
    measures, captions = held_out.evaluate(model, tokenizer, PREPROCESSING)
    checkpoint = Checkpoint(model.eval(), tokenizer, PREPROCESSING, model.config, 1, {}, "digest", "here")
    data = read_evaluation_set(held_out_file)
    data.images, data.captions = data.images[:18], data.captions[:18]
    retrieval = evaluate_retrieval(checkpoint, data)
    assert held_out.pictures == 18
    assert measures.pop("caption_loss") == pytest.approx(caption_loss(checkpoint, data), rel=1e-6)
    assert set(measures) == {f"{way}_recall_at_{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5)}
    assert all(value == retrieval[name] for name, value in measures.items())
    assert [written.caption for written in captions] == write_captions(checkpoint, data.images[:16])
    assert captions[3].accepted == ["a white picture number 3", "a second caption 3"]


def test_a_model_in_training_is_left_as_it_was_and_trains_on(
    model: CoCa, tokenizer: Tokenizer, held_out_file: str
) -> None:
    def train() -> list[float]:
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        tokens_BT = pad_tokens(tokenizer.encode(["a red thing", "a blue thing"]), 12, 0, tokenizer.end_id)
        losses = Objective(model, LossConfig())(torch.randn(2, 3, 16, 16), tokens_BT)
        optimizer.zero_grad()
        (losses.contrastive + losses.captioning).backward()
        optimizer.step()
        return [losses.contrastive.item(), losses.captioning.item()]

    model.train()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    expected = [train(), train()]
    model.load_state_dict(weights)
    found = []
    for _ in range(2):
        random_state = torch.get_rng_state()
        HeldOut(held_out_file, 5).evaluate(model, tokenizer, PREPROCESSING)
        assert torch.equal(torch.get_rng_state(), random_state)
        assert model.training
        found.append(train())
    assert found == expected
    HeldOut(held_out_file, 5).evaluate(model.eval(), tokenizer, PREPROCESSING)
    assert not model.training


def test_one_rank_judges_while_the_others_wait(
    model: CoCa, tokenizer: Tokenizer, held_out_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = HeldOut(held_out_file, 5)
    alone = held_out.evaluate(model, tokenizer, PREPROCESSING)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda *_: 2)
    for collective in ("all_reduce", "all_gather", "broadcast", "barrier", "reduce"):
        monkeypatch.delattr(f"torch.distributed.{collective}")
    assert held_out.evaluate(model, tokenizer, PREPROCESSING) == alone


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_an_evaluation_is_written_and_read_back_by_step(
    where: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    model: CoCa,
    tokenizer: Tokenizer,
    held_out_file: str,
) -> None:
    store = Store(request.getfixturevalue("s3") + "/run" if where == "s3" else tmp_path / "run")
    held_out = HeldOut(held_out_file, 20)
    measures, captions = held_out.evaluate(model, tokenizer, PREPROCESSING)
    held_out.save(store, 1000, measures, captions)
    store.write("evaluations/pictures/00001.jpg", b"there already")
    held_out.save(store, 20, measures, captions[:2])
    held_out.save(store, 20, measures | {"caption_loss": 1.5}, captions[:2])
    first, second = read_evaluations(store)
    assert (first["step"], second["step"]) == (20, 1000)
    assert first["measures"] == measures | {"caption_loss": 1.5}
    assert second["captions"] == json.loads(json.dumps([written._asdict() for written in captions]))
    assert store.list("evaluations/pictures") == [f"{n:05d}.jpg" for n in range(16)]
    assert store.read("evaluations/pictures/00001.jpg") == b"there already"
    picture = Image.open(io.BytesIO(store.read("evaluations/pictures/00000.jpg")))
    assert (picture.format, max(picture.size)) == ("JPEG", 20)


def test_a_run_without_evaluations_has_none(tmp_path: Path) -> None:
    assert read_evaluations(Store(tmp_path)) == []


def test_a_missing_set_names_the_field() -> None:
    with pytest.raises(BadInput, match=r"there is no evaluation set .*Give held_out a Parquet file"):
        HeldOut("no/such.parquet", 5)
