"""Likelihoods of captions equal those of the training pass, pair by pair."""

import pytest
import torch

from coca.config import ModelConfig
from coca.likelihood import caption_log_likelihood
from coca.model import CoCa


@pytest.mark.parametrize("block", ["paper", "open_clip"])
@pytest.mark.parametrize("step", [1, 2, 64])
def test_every_pair_equals_the_training_pass(tiny_model: ModelConfig, block: str, step: int) -> None:
    torch.manual_seed(0)
    text = tiny_model.text.model_copy(update={"multimodal_block": block})
    model = CoCa(tiny_model.model_copy(update={"text": text})).double().eval()
    for parameter in model.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    captions = torch.tensor([[1, 9, 8, 7, 2], [1, 9, 2, 0, 0], [1, 30, 31, 2, 0]])
    found = caption_log_likelihood(model, images, captions, step=step)
    assert found.shape == (4, 3)
    for i in range(4):
        for j, row in enumerate(captions):
            real = row[row != 0]
            log_probs = model(images[i : i + 1], real[None]).logits[0].log_softmax(-1)
            expected = log_probs.gather(1, real[1:, None]).sum()
            torch.testing.assert_close(found[i, j], expected.detach(), rtol=1e-12, atol=1e-12)


def test_logits_of_all_pairs_are_never_held(tiny_model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a vocabulary of 49,408, 64 images and 8 captions of 76 tokens would take 7 GB."""
    monkeypatch.setattr("coca.likelihood._ROWS", 5)
    torch.manual_seed(0)
    model = CoCa(tiny_model).double().eval()
    images, captions = torch.randn(4, 3, 16, 16, dtype=torch.float64), torch.tensor([[1, 9, 8, 7, 2], [1, 9, 2, 0, 0]])
    rows: list[int] = []
    logits = model.logits

    def spy(states: torch.Tensor) -> torch.Tensor:
        rows.append(len(states))
        return logits(states)

    monkeypatch.setattr(model, "logits", spy)
    found = caption_log_likelihood(model, images, captions)
    assert rows == [5] * 6 + [2]  # 4 images, 2 captions, 4 predicted positions
    monkeypatch.setattr("coca.likelihood._ROWS", 1024)
    torch.testing.assert_close(found, caption_log_likelihood(model, images, captions), rtol=1e-12, atol=1e-12)
