"""The objective: both losses of one pass are those of the plain functions, in value and gradient."""

import shutil
from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from coca.config import ModelConfig
from coca.losses import captioning_loss, contrastive_loss, real_targets
from coca.model import CoCa
from coca.objective import Cached, Features, Objective
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


def test_features_are_those_of_the_whole_pass(tiny_model: ModelConfig) -> None:
    model = build(tiny_model).float()
    objective, images = Objective(model, LossConfig()), pictures().float()
    kept = torch.tensor([[0, 3]] * 4)
    states = model.states(images, TOKENS, kept)
    features = objective.features(images, TOKENS, kept)
    torch.testing.assert_close(features, Features(states.image_features_BE, states.text_features_BE))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = objective.features(images, TOKENS, kept)
    assert {value.dtype for value in rounded} == {torch.float32}
    assert not rounded.images_BE.equal(features.images_BE)


def test_a_part_has_its_share_of_the_captioning_loss(tiny_model: ModelConfig) -> None:
    objective = Objective(build(tiny_model), LossConfig(label_smoothing=0.1))
    whole = objective(pictures(), TOKENS).captioning
    nothing = Features(*[torch.zeros(2, 8).double()] * 2)
    targets = real_targets(TOKENS, 0)
    assert targets == 11
    cached = Cached(nothing, (torch.zeros(()),), targets)
    parts = [objective(pictures()[rows], TOKENS[rows], None, cached) for rows in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(sum(part.captioning for part in parts), whole)


@pytest.mark.parametrize("contrastive", ["softmax", "sigmoid"])
def test_the_stand_in_has_the_gradients_it_was_given(tiny_model: ModelConfig, contrastive: str) -> None:
    model = build(tiny_model.model_copy(update={"initial_logit_bias": -10.0 if contrastive == "sigmoid" else None}))
    objective = Objective(model, LossConfig(contrastive=contrastive))
    given = Features(*torch.randn(2, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))
    scalars = tuple(torch.tensor(0.25 + number) for number in range(len(objective.scalars)))
    stand_in = objective(pictures(), TOKENS, None, Cached(given, scalars, real_targets(TOKENS, 0))).contrastive
    expected = torch.autograd.grad(
        list(model.states(pictures(), TOKENS)[:2]), model.text_projection.weight, list(given), retain_graph=True
    )
    found = torch.autograd.grad(stand_in, [model.text_projection.weight, *objective.scalars])
    torch.testing.assert_close(found[0], expected[0])
    assert [float(value) for value in found[1:]] == [float(value) for value in scalars]


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at a block's inputs
def test_blocks_can_be_compiled_alone(tiny_model: ModelConfig) -> None:
    """With a backend that counts graphs: one for each kind of block, none around them."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model = build(tiny_model)
    plain = Objective(model, LossConfig())(pictures(), TOKENS)
    with patch("torch.compile", partial(torch.compile, backend=counter)):
        objective = Objective(model, LossConfig(), compiled=True)
        objective.compile_blocks()
    torch.testing.assert_close(objective(pictures(), TOKENS), plain)
    assert counter.frame_count >= 3
    assert all("forward" in vars(block) for block in model.multimodal.blocks)
