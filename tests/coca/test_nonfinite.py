"""Samples that overflow are found, and only they."""

import pytest
import torch

from coca.config import ModelConfig
from coca.model import CoCa
from coca.nonfinite import nonfinite_samples
from coca.objective import Objective
from coca.train_config import LossConfig

IDS = ["a", "b", "c", "d"]


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    tokens_BT = torch.randint(3, 320, (4, 6))
    tokens_BT[1, 4:] = 0
    return torch.randn(4, 3, 16, 16), tokens_BT


@pytest.fixture
def objective(tiny_model: ModelConfig) -> Objective:
    torch.manual_seed(0)
    return Objective(CoCa(tiny_model), LossConfig())


def test_a_batch_of_numbers_names_nobody(objective: Objective, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert nonfinite_samples(objective, *batch, IDS) == []


def test_pictures_without_numbers_are_named(objective: Objective, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    images, tokens = batch
    images[1, 0, 0, 0] = float("nan")
    images[3, 2, 5, 5] = float("inf")
    assert nonfinite_samples(objective, images, tokens, IDS) == ["b", "d"]


def test_captions_that_overflow_are_named(objective: Objective, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    """A token whose embedding has blown up: only its captions are bad, whatever stands beside them."""
    images, tokens = batch
    tokens[2, 3] = 319
    tokens[[0, 1, 3]] = tokens[[0, 1, 3]].clamp(max=318)
    objective.model.unimodal.token_embedding.weight.data[319] = float("inf")
    assert nonfinite_samples(objective, images, tokens, IDS) == ["c"]


def test_a_caption_loss_that_overflows_alone_is_named(
    objective: Objective, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """A row of the head at infinity: both embeddings are fine."""
    assert objective.model.multimodal.head is not None
    objective.model.multimodal.head.weight.data[5] = float("inf")
    assert nonfinite_samples(objective, *batch, IDS) == IDS


def test_nothing_is_left_behind(objective: Objective, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    nonfinite_samples(objective, *batch, IDS)
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in objective.parameters())


def test_a_sigmoid_model_is_searched_too(tiny_model: ModelConfig, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    """It has a second scalar beside the temperature."""
    torch.manual_seed(0)
    model = CoCa(tiny_model.model_copy(update={"initial_logit_bias": -10.0}))
    images, tokens = batch
    images[0] = float("inf")
    assert nonfinite_samples(Objective(model, LossConfig(contrastive="sigmoid")), images, tokens, IDS) == ["a"]
