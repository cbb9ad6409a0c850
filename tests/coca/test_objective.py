"""The objective: both losses of one pass are those of the plain functions, in value and gradient."""

import shutil

import pytest
import torch

from coca.config import ModelConfig
from coca.losses import captioning_loss, contrastive_loss
from coca.model import CoCa
from coca.objective import Objective
from coca.train_config import LossConfig

TOKENS = torch.tensor([[1, 9, 8, 2], [1, 7, 2, 0], [1, 9, 8, 2], [1, 5, 6, 2]])


def build(config: ModelConfig) -> CoCa:
    torch.manual_seed(0)
    return CoCa(config).double()


def pictures() -> torch.Tensor:
    return torch.randn(4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_and_gradients_are_those_of_the_plain_functions(
    tiny_model: ModelConfig, tied: bool, smoothing: float
) -> None:
    text = tiny_model.text.model_copy(update={"tied_head": tied})
    config = tiny_model.model_copy(update={"text": text})
    model, reference = build(config), build(config)
    losses = Objective(model, LossConfig(label_smoothing=smoothing))(pictures(), TOKENS)
    output = reference(pictures(), TOKENS)
    contrastive = contrastive_loss(output.image_features, output.text_features, output.logit_scale)
    captioning = captioning_loss(output.logits, TOKENS, 0, label_smoothing=smoothing)
    torch.testing.assert_close(losses.contrastive, contrastive, rtol=1e-12, atol=0)
    torch.testing.assert_close(losses.captioning, captioning, rtol=1e-12, atol=0)
    (losses.contrastive + 2 * losses.captioning).backward()
    (contrastive + 2 * captioning).backward()
    for (name, found), (_, expected) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert found.grad is not None, name
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-9, atol=1e-12, msg=name)


def test_repeated_captions_count_as_negatives_unless_ignored(tiny_model: ModelConfig) -> None:
    model = build(tiny_model)
    counted = Objective(model, LossConfig())(pictures(), TOKENS).contrastive
    ignored = Objective(model, LossConfig(repeated_captions="ignored"))(pictures(), TOKENS).contrastive
    assert ignored < counted


def test_the_sigmoid_loss_has_a_bias_of_its_own(tiny_model: ModelConfig) -> None:
    model = build(tiny_model.model_copy(update={"initial_logit_bias": -10.0}))
    loss = Objective(model, LossConfig(contrastive="sigmoid"))(pictures(), TOKENS).contrastive
    loss.backward()
    assert model.logit_bias is not None
    assert model.logit_bias.grad is not None
    assert model.logit_bias.grad.item() != 0


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_it_gives_the_same(tiny_model: ModelConfig) -> None:
    torch._dynamo.reset()
    model = build(tiny_model)
    plain = Objective(model, LossConfig())(pictures(), TOKENS)
    compiled = Objective(model, LossConfig(), compiled=True)(pictures(), TOKENS)
    torch.testing.assert_close(compiled.contrastive, plain.contrastive)
    torch.testing.assert_close(compiled.captioning, plain.captioning)


def test_dropped_patches_are_not_seen(tiny_model: ModelConfig) -> None:
    objective = Objective(build(tiny_model), LossConfig())
    whole, all_kept, some = (
        objective(pictures(), TOKENS, kept).captioning
        for kept in (None, torch.arange(4).expand(4, -1), torch.tensor([[0, 1]] * 4))
    )
    torch.testing.assert_close(all_kept, whole)
    assert (some - whole).abs() > 1e-6
