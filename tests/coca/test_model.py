"""The architecture: what sees what, and that nothing is left to chance."""

import math

import pytest
import torch
from torch import Tensor

from coca.config import ModelConfig, VisionConfig
from coca.errors import BadInput
from coca.model import CoCa
from coca.typed_config import build_config


@pytest.fixture
def model(tiny_model: ModelConfig) -> CoCa:
    torch.manual_seed(0)
    model = CoCa(tiny_model).double().eval()
    for parameter in model.parameters():  # away from the start values, so that no part is the identity
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_shapes_and_unit_length(model: CoCa) -> None:
    output = model(images(2), torch.tensor([[1, 9, 8, 2], [1, 9, 2, 0]]))
    assert output.image_features.shape == output.text_features.shape == (2, 8)
    assert output.logits.shape == (2, 3, 320)
    torch.testing.assert_close(output.image_features.norm(dim=-1), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(output.text_features.norm(dim=-1), torch.ones(2, dtype=torch.float64))
    assert output.logit_scale.ndim == 0


def test_the_embedding_token_sees_every_token(model: CoCa) -> None:
    """Bites when the embedding token is placed first: it would see nothing of the caption."""
    before = model.encode_text(torch.tensor([[1, 9, 8, 7, 2]]))
    for position in range(5):
        tokens = torch.tensor([[1, 9, 8, 7, 2]])
        tokens[0, position] = 30
        assert (model.encode_text(tokens) - before).abs().max() > 1e-4, position


def test_no_caption_token_sees_the_embedding_token(model: CoCa) -> None:
    tokens = torch.tensor([[1, 9, 8, 7, 2]])
    before = model(images(1), tokens)
    model.unimodal.embedding_token_D.data.add_(torch.linspace(-1, 1, 16))
    after = model(images(1), tokens)
    torch.testing.assert_close(after.logits, before.logits, rtol=0, atol=0)
    assert (after.text_features - before.text_features).abs().max() > 1e-4


def test_captions_are_causal(model: CoCa) -> None:
    before = model(images(1), torch.tensor([[1, 9, 8, 7, 2]])).logits
    after = model(images(1), torch.tensor([[1, 9, 8, 50, 2]])).logits
    torch.testing.assert_close(after[:, :3], before[:, :3], rtol=0, atol=1e-12)
    assert (after[:, 3] - before[:, 3]).abs().max() > 1e-4


def test_padding_changes_nothing(model: CoCa) -> None:
    short = torch.tensor([[1, 9, 2]])
    padded = torch.tensor([[1, 9, 2, 0, 0, 0]])
    a, b = model(images(1), short), model(images(1), padded)
    torch.testing.assert_close(b.text_features, a.text_features, rtol=0, atol=1e-12)
    torch.testing.assert_close(b.logits[:, :2], a.logits, rtol=0, atol=1e-12)


def test_a_caption_may_fill_the_context(model: CoCa) -> None:
    full = torch.full((1, 12), 9)
    assert model(images(1), full).logits.shape == (1, 11, 320)


def test_the_caption_sees_the_image_and_the_embedding_does_not(model: CoCa) -> None:
    tokens = torch.tensor([[1, 9, 8, 2]] * 2)
    output = model(images(2), tokens)
    assert (output.logits[0] - output.logits[1]).abs().max() > 1e-4
    torch.testing.assert_close(output.text_features[0], output.text_features[1])


def test_poolers_are_in_cascade(model: CoCa) -> None:
    """The contrastive embedding depends on the captioning pooler's queries."""
    before, _ = model.encode_image(images(1))
    model.caption_pooler.queries_QD.data.add_(torch.randn_like(model.caption_pooler.queries_QD))
    after, _ = model.encode_image(images(1))
    assert (after - before).abs().max() > 1e-4


def test_every_parameter_is_initialised(tiny_model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is filled with NaN before it is initialised: a parameter that is forgotten stays NaN."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        model = CoCa(tiny_model)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        assert parameter.abs().max() < 5, name
    assert model.logit_scale.item() == pytest.approx(1 / 0.07, rel=1e-6)


def test_logit_scale_is_capped(model: CoCa) -> None:
    model.log_logit_scale.data.fill_(math.log(500))
    assert model.logit_scale.item() == 100


def test_head_and_input_embedding_are_apart(model: CoCa) -> None:
    assert model.multimodal.head.weight.data_ptr() != model.unimodal.token_embedding.weight.data_ptr()


def test_a_config_that_does_not_divide_is_refused() -> None:
    with pytest.raises(BadInput, match="patch_size = 7 does not divide image_size = 48"):
        build_config(VisionConfig, {"image_size": 48, "patch_size": 7})
