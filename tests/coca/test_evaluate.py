"""Evaluation on a model small enough to know the answers."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from coca.checkpoint import Checkpoint
from coca.config import ModelConfig, Preprocessing
from coca.errors import BadInput
from coca.evaluate import (
    EvaluationSet,
    embed_texts,
    evaluate_captions,
    evaluate_classification,
    evaluate_retrieval,
    perplexity,
    read_evaluation_set,
    write_captions,
)
from coca.model import CoCa
from coca.tokenizer import Tokenizer


@pytest.fixture
def checkpoint(tiny_model: ModelConfig, tokenizer: Tokenizer) -> Checkpoint:
    torch.manual_seed(0)
    text = tiny_model.text.model_copy(update={"vocab_size": tokenizer.vocab_size})
    config = tiny_model.model_copy(update={"text": text})
    return Checkpoint(CoCa(config).eval(), tokenizer, Preprocessing(image_size=16), config, 1, {}, "digest", "here")


@pytest.fixture
def pictures(make_sample: Callable[[int], dict[str, Any]]) -> EvaluationSet:
    samples = [make_sample(n) for n in range(5)]
    return EvaluationSet([s["image"] for s in samples], [[str(s["caption"])] for s in samples], ["red"] * 5)


def test_exact_captions_are_counted(checkpoint: Checkpoint, pictures: EvaluationSet) -> None:
    written = write_captions(checkpoint, pictures.images)
    accepted = [[text.upper(), "x"] if index < 2 else ["something else"] for index, text in enumerate(written)]
    result = evaluate_captions(checkpoint, EvaluationSet(pictures.images, accepted, None))
    assert result["exact_caption"] == pytest.approx(0.4)
    assert result["exact"] == [True, True, False, False, False]


def test_uniform_head_gives_perplexity_of_the_vocabulary(checkpoint: Checkpoint, pictures: EvaluationSet) -> None:
    checkpoint.model.multimodal.head.weight.data.zero_()
    assert perplexity(checkpoint, pictures) == pytest.approx(checkpoint.config.text.vocab_size, rel=1e-4)


def test_retrieval_reports_chance(checkpoint: Checkpoint, pictures: EvaluationSet) -> None:
    result = evaluate_retrieval(checkpoint, pictures)
    assert (result["pictures"], result["texts"]) == (5, 5)
    assert result["chance_image_to_text_at_1"] == result["chance_text_to_image_at_1"] == pytest.approx(0.2)


def test_classification_with_a_text_tower_as_oracle(
    checkpoint: Checkpoint, pictures: EvaluationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = ["red", "green", "blue", "red", "green"]
    truths = embed_texts(checkpoint, [f"a {label} thing" for label in labels])
    monkeypatch.setattr("coca.evaluate.embed_images", lambda *_: truths)
    data = EvaluationSet(pictures.images, pictures.captions, labels)
    result = evaluate_classification(checkpoint, data, ["blue", "green", "red"], ["a {} thing"])
    assert result["zero_shot_accuracy"] == 1.0
    assert result["chance"] == pytest.approx(1 / 3)


def test_classification_by_likelihood_equals_one_pair_at_a_time(
    checkpoint: Checkpoint, pictures: EvaluationSet
) -> None:
    classes, templates = ["red", "green", "blue"], ["a {} picture number 1", "{}"]
    rows = []
    for picture in pictures.images:
        scores = []
        for name in classes:
            prompts = [EvaluationSet([picture], [[template.replace("{}", name)]], None) for template in templates]
            lengths = [len(checkpoint.tokenizer.encode(one.captions[0])[0]) - 1 for one in prompts]
            logs = [-math.log(perplexity(checkpoint, one)) * n for one, n in zip(prompts, lengths, strict=True)]
            scores.append(sum(logs) / len(logs))
        rows.append(classes[scores.index(max(scores))])
    right = EvaluationSet(pictures.images, pictures.captions, rows)
    result = evaluate_classification(checkpoint, right, classes, templates, by="likelihood")
    assert (result["by"], result["zero_shot_accuracy"]) == ("likelihood", 1.0)
    wrong = EvaluationSet(pictures.images, pictures.captions, ["blue" if row != "blue" else "red" for row in rows])
    assert evaluate_classification(checkpoint, wrong, classes, templates, by="likelihood")["zero_shot_accuracy"] == 0


def test_bad_classes_are_named(checkpoint: Checkpoint, pictures: EvaluationSet) -> None:
    with pytest.raises(BadInput, match="label 'red' is not among the classes"):
        evaluate_classification(checkpoint, pictures, ["blue"], ["a {}"])
    with pytest.raises(BadInput, match=r"template 'a thing' has no {}"):
        evaluate_classification(checkpoint, pictures, ["red"], ["a thing"])


def test_a_bad_evaluation_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="there is no evaluation set"):
        read_evaluation_set(str(tmp_path / "none.parquet"))
    (tmp_path / "text.parquet").write_text("no")
    with pytest.raises(BadInput, match="is not Parquet"):
        read_evaluation_set(str(tmp_path / "text.parquet"))
    pq.write_table(pa.table({"image": [b""]}), tmp_path / "columns.parquet")
    with pytest.raises(BadInput, match="has no column 'captions', only image"):
        read_evaluation_set(str(tmp_path / "columns.parquet"))
    pq.write_table(pa.table({"image": [b"x"], "captions": [["a"]]}), tmp_path / "broken.parquet")
    with pytest.raises(BadInput, match="cannot read the evaluation set"):
        read_evaluation_set(str(tmp_path))
    broken = read_evaluation_set(str(tmp_path / "broken.parquet"))
    assert broken.captions == [["a"]]


def test_a_picture_that_does_not_decode_is_named(checkpoint: Checkpoint) -> None:
    with pytest.raises(BadInput, match="picture 0 of the evaluation set: not_an_image"):
        write_captions(checkpoint, [b"no picture at all"])


@pytest.mark.parametrize(
    ("columns", "cause"),
    [
        # As letters these would be captions.
        ({"image": [b"x"], "captions": ["a red circle"]}, r"column 'captions' holds string, not list<item: string>"),
        ({"image": [1], "captions": [["a"]]}, r"column 'image' holds int64, not binary"),
        ({"image": [b"x", None], "captions": [["a"], ["b"]]}, r"column 'image' has 1 nulls"),
        ({"image": [b"x"], "captions": [["a", None]]}, r"row 0 has no captions"),
        ({"image": [b"x"], "captions": [[]]}, r"row 0 has no captions|holds list<item: null>"),
        ({"image": [b"x"], "captions": [["a"]], "label": pa.array([None], pa.string())}, r"column 'label' has 1 nulls"),
    ],
)
def test_columns_of_another_kind_are_refused(tmp_path: Path, columns: dict[str, Any], cause: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "set.parquet")
    with pytest.raises(BadInput, match=cause):
        read_evaluation_set(str(tmp_path / "set.parquet"))
