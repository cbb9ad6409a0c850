"""Greedy captions with the cache equal those without, in float64, where ties cannot flake."""

import pytest
import torch
from torch import Tensor

from coca.config import ModelConfig
from coca.generate import generate
from coca.model import CoCa

BEGIN, END, PAD = 1, 2, 0


def uncached(model: CoCa, images: Tensor, max_length: int) -> Tensor:
    tokens = torch.full((len(images), 1), BEGIN)
    finished = torch.zeros(len(images), dtype=torch.bool)
    _, image_tokens = model.encode_image(images)
    while tokens.shape[1] < max_length and not finished.all():
        _, hidden = model.unimodal(tokens)
        logits = model.multimodal(hidden, model.multimodal.image_keys_values(image_tokens))[:, -1]
        logits[:, [PAD, BEGIN]] = -torch.inf
        following = logits.argmax(-1).masked_fill(finished, PAD)
        finished |= following == END
        tokens = torch.cat([tokens, following[:, None]], dim=1)
    return tokens


@pytest.mark.parametrize("seed", range(20))
def test_cached_equals_uncached(tiny_model: ModelConfig, seed: int) -> None:
    torch.manual_seed(seed)
    text = tiny_model.text.model_copy(update={"vocab_size": 6})  # few tokens: captions end early and at different steps
    model = CoCa(tiny_model.model_copy(update={"text": text})).double().eval()
    for parameter in model.parameters():
        parameter.data.add_(0.5 * torch.randn_like(parameter))
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    with torch.inference_mode():
        expected = uncached(model, images, max_length=12)
    generation = generate(model, images, begin_id=BEGIN, end_id=END, pad_id=PAD)
    assert generation.tokens_BT.tolist() == expected.tolist()
    torch.testing.assert_close(generation.image_features_BE, model.encode_image(images)[0])


def test_max_length_cuts(tiny_model: ModelConfig) -> None:
    torch.manual_seed(0)
    model = CoCa(tiny_model).eval()
    tokens = generate(model, torch.zeros(2, 3, 16, 16), begin_id=BEGIN, end_id=-1, pad_id=PAD, max_length=5).tokens_BT
    assert tokens.shape == (2, 5)
    assert (tokens[:, 0] == BEGIN).all()
