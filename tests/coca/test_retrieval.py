"""Recall against published anchors (big_vision's image_text_retrieval_test.py, given as distances)."""

import pytest
import torch

from coca.retrieval import recall_at_k

OWNER = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
A = [
    [0, 0, 0.1, 0.5, 0.1, 0.2, 0.5, 0.1],
    [0.5, 0.4, 0, 0, 0.4, 0.2, 0.6, 0.4],
    [0.5, 0.4, 0.1, 0.5, 0, 0, 0.8, 0.3],
    [0.5, 0.4, 0.1, 0.5, 0.3, 0.2, 0, 0],
]
B = [
    [0.8, 0.8, 0.1, 0.5, 0.1, 0.2, 0.5, 0.1],
    [0.5, 0.4, 0, 0, 0.4, 0.2, 0.6, 0.4],
    [0.5, 0.4, 0.1, 0.5, 0, 0.8, 0.8, 0.3],
    [0.5, 0.4, 0.1, 0.5, 0.4, 0.2, 0.3, 0.3],
]


def recalls(distances: list[list[float]], direction: str) -> list[float]:
    found = recall_at_k(-torch.tensor(distances), OWNER)
    return [found[f"{direction}_recall_at_{k}"] for k in (1, 5, 10)]


def test_everything_found() -> None:
    assert recalls(A, "image_to_text") == [1, 1, 1]
    assert recalls(A, "text_to_image") == [1, 1, 1]


def test_image_to_text_anchor() -> None:
    assert recalls(B, "image_to_text") == pytest.approx([0.5, 0.75, 1])


def test_text_to_image_anchor() -> None:
    rows = [[0.8, 0.8, 0.1, 0.5, 0.1, 0.2, 0.1, 0.1], *B[1:]]
    assert recalls(rows, "text_to_image") == pytest.approx([0.375, 1, 1])


def test_ties_count_against_us() -> None:
    found = recall_at_k(torch.zeros(4, 4), torch.arange(4), ks=(1,))
    assert set(found.values()) == {0.0}


def test_a_model_that_gives_no_numbers_finds_nothing() -> None:
    found = recall_at_k(torch.full((3, 3), torch.nan), torch.arange(3), ks=(1,))
    assert found == {"image_to_text_recall_at_1": 0.0, "text_to_image_recall_at_1": 0.0}
