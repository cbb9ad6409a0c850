"""What is done to logits: golden values. Their effect on captions: test_generate.py."""

import pytest
import torch

from coca.config import GenerationConfig
from coca.logits import adjust_logits, sample

INF = float("inf")


def adjust(tokens: list[int], **options: object) -> list[float]:
    logits = torch.tensor([[1.0, -2.0, 3.0, 0.5, -1.0]], dtype=torch.float64)
    config = GenerationConfig.model_validate(options)
    adjusted: list[float] = adjust_logits(logits, torch.tensor([tokens]), config, 2)[0].tolist()
    return adjusted


def test_without_options_nothing_changes() -> None:
    assert adjust([1, 3]) == [1.0, -2.0, 3.0, 0.5, -1.0]


def test_repetition_is_divided_or_multiplied_once_a_token() -> None:
    assert adjust([0, 0, 1], repetition_penalty=2.0) == [0.5, -4.0, 3.0, 0.5, -1.0]


def test_runs_occur_once() -> None:
    assert adjust([3, 4, 1, 3], no_repeat_ngram=2) == [1.0, -2.0, 3.0, 0.5, -INF]
    assert adjust([3, 4, 1, 3, 4], no_repeat_ngram=3) == [1.0, -INF, 3.0, 0.5, -1.0]
    assert adjust([3, 4], no_repeat_ngram=1) == [1.0, -2.0, 3.0, -INF, -INF]
    assert adjust([3], no_repeat_ngram=3) == [1.0, -2.0, 3.0, 0.5, -1.0]


def test_the_end_may_always_repeat_and_rules_that_leave_nothing_do_not_hold() -> None:
    assert adjust([2, 0], no_repeat_ngram=1)[2] == 3.0
    assert adjust([0, 1, 3, 4], no_repeat_ngram=1, min_length=9) == [1.0, -2.0, 3.0, 0.5, -1.0]


def test_no_end_before_the_shortest_length() -> None:
    assert adjust([1], min_length=3)[2] == -INF
    assert adjust([1, 3], min_length=3)[2] == 3.0


def draws(uniforms: list[float], **options: object) -> list[int]:
    logits = torch.tensor([0.5, 0.125, 0.25, 0.125], dtype=torch.float64).log().expand(len(uniforms), -1)
    config = GenerationConfig.model_validate({"temperature": 1.0} | options)
    drawn: list[int] = sample(logits, torch.tensor(uniforms, dtype=torch.float64), config).tolist()
    return drawn


def test_draws_follow_the_summed_probability_likeliest_first() -> None:
    assert draws([0.0, 0.49, 0.51, 0.74, 0.76, 0.87, 0.88, 0.999]) == [0, 0, 2, 2, 1, 1, 3, 3]


def test_top_k_and_top_p_leave_the_likeliest() -> None:
    assert draws([0.0, 0.66, 0.67, 0.999], top_k=2) == [0, 0, 2, 2]
    assert draws([0.0, 0.999], top_p=0.4) == [0, 0]
    assert draws([0.0, 0.66, 0.67, 0.999], top_p=0.6) == [0, 0, 2, 2]


def test_temperature_flattens_and_sharpens() -> None:
    assert draws([0.35], temperature=100.0) == [2]
    assert draws([0.96], temperature=0.25) == [2]
    assert draws([0.93], temperature=0.25) == [0]


def test_frequencies_are_those_of_the_distribution() -> None:
    uniforms = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    counts = torch.bincount(torch.tensor(draws(uniforms)), minlength=4) / 20_000
    assert counts.tolist() == pytest.approx([0.5, 0.125, 0.25, 0.125], abs=0.015)


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.tensor([[-INF, 0.0, -INF]], dtype=torch.float64)
    config = GenerationConfig(temperature=1.0)
    assert sample(logits, torch.tensor([0.99999999], dtype=torch.float64), config).item() == 1
