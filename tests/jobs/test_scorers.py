"""A checkpoint as a scorer: the same numbers as evaluation, whoever computes them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from coca.checkpoint import load_checkpoint, save_checkpoint
from coca.config import ModelConfig, Preprocessing
from coca.errors import BadInput
from coca.evaluate import embed_images, embed_texts
from coca.images import ImageLimits, decode_rgb
from coca.model import CoCa
from coca.storage import Store
from coca.tokenizer import Tokenizer
from jobs.scorers import CheckpointScorer, scorer_spec
from tests.stored_dataset import picture


def save(root: Path, model: ModelConfig, tokenizer: Tokenizer | None, seed: int = 0) -> None:
    torch.manual_seed(seed)
    save_checkpoint(
        Store(root),
        "ckpt",
        model=CoCa(model),
        tokenizer=tokenizer,
        preprocessing=Preprocessing(image_size=16),
        step=1,
        provenance={},
    )


def test_scores_are_the_cosines_of_evaluation(tmp_path: Path, tiny_model: ModelConfig, tokenizer: Tokenizer) -> None:
    save(tmp_path, tiny_model, tokenizer)
    spec = scorer_spec(f"{tmp_path}/ckpt", actors=3)
    assert (spec.actors, spec.num_gpus, spec.arguments["device"]) == (3, 0.0, "cpu")
    assert spec.source.startswith(f"{tmp_path}/ckpt@")
    files, captions = [picture(name) for name in "abc"], ["a red picture", "a blue picture number 3", "a"]
    images = [np.asarray(decode_rgb(data, ImageLimits())) for data in files]
    scores = spec.make().score(images, captions)
    checkpoint = load_checkpoint(f"{tmp_path}/ckpt")
    expected = (embed_images(checkpoint, files) * embed_texts(checkpoint, captions)).sum(dim=1).numpy()
    assert scores.keys() == {"coca_similarity"}
    assert scores["coca_similarity"].dtype == np.float32
    np.testing.assert_allclose(scores["coca_similarity"], expected, atol=1e-6)
    assert np.ptp(expected) > 1e-3
    # One picture at a time gives the same.
    alone = spec.make().score(images[1:2], captions[1:2])["coca_similarity"]
    np.testing.assert_allclose(alone, expected[1:2], atol=1e-6)


def test_a_checkpoint_that_changes_on_the_way_is_refused(
    tmp_path: Path, tiny_model: ModelConfig, tokenizer: Tokenizer
) -> None:
    save(tmp_path, tiny_model, tokenizer)
    spec = scorer_spec(f"{tmp_path}/ckpt")
    save(tmp_path, tiny_model, tokenizer, seed=1)
    with pytest.raises(BadInput, match="has changed since this run began"):
        spec.make()
    assert scorer_spec(f"{tmp_path}/ckpt").source != spec.source


def test_what_is_no_scorer_is_refused(tmp_path: Path, tiny_model: ModelConfig) -> None:
    with pytest.raises(BadInput, match="is not a checkpoint"):
        scorer_spec(f"{tmp_path}/none")
    with pytest.raises(BadInput, match="cannot load 'no_such_module:score'"):
        scorer_spec("no_such_module:score")
    save(tmp_path, tiny_model, None)
    with pytest.raises(BadInput, match="holds no tokenizer"):
        scorer_spec(f"{tmp_path}/ckpt")


def test_a_factory_by_name() -> None:
    spec = scorer_spec("jobs.scorers:CheckpointScorer", gpus=0.5)
    assert (spec.factory, spec.source, spec.num_gpus) == (CheckpointScorer, "jobs.scorers:CheckpointScorer", 0.5)
