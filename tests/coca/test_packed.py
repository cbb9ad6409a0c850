"""Packed layers give the same numbers, only within the block and only without gradients."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import coca.generate
from coca.config import ModelConfig
from coca.model import CoCa
from coca.packed import Linear, packed

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Linear(96, 200), nn.GELU(), Linear(200, 33, bias=False))


@needs_onednn
@pytest.mark.parametrize("shape", [(1, 96), (4, 96), (3, 50, 96), (2, 2, 7, 96)])
def test_the_numbers_are_those_of_the_plain_layer(shape: tuple[int, ...]) -> None:
    model, x = layers(), torch.randn(*shape)
    with torch.no_grad():
        plain = model(x)
        with packed(model):
            torch.testing.assert_close(model[0].gelu(x), model[1](model[0](x)), rtol=1e-5, atol=1e-5)
            assert all(each.packed_weight is not None for each in model if isinstance(each, Linear))
            torch.testing.assert_close(model(x), plain, rtol=1e-5, atol=1e-5)
        assert torch.equal(model(x), plain)


@needs_onednn
def test_it_ends_with_the_block_and_not_with_an_inner_one() -> None:
    model = layers()
    with pytest.raises(KeyError), packed(model[0]):
        with packed(model):
            assert model[2].packed_weight is not None
        assert model[2].packed_weight is None
        assert model[0].packed_weight is not None
        raise KeyError
    assert model[0].packed_weight is None


@needs_onednn
def test_gradients_and_other_precisions_take_the_plain_path() -> None:
    model, x = layers(), torch.randn(4, 96)
    with packed(model):
        model[0].weight.data.zero_()  # the copy knows nothing of it, so the result tells who was asked
        output = model[0](x)
        assert torch.equal(output, model[0].bias.expand(4, -1))
        output.sum().backward()
        with torch.no_grad():
            assert not torch.allclose(model[0](x), output)
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(model[0](x), model[0].bias.bfloat16().expand(4, -1))


def test_double_precision_is_not_packed() -> None:
    model = layers().double()
    with packed(model):
        assert model[0].packed_weight is None


def test_state_and_copies_know_nothing_of_it() -> None:
    model = layers()
    with packed(model):
        keys = set(model.state_dict())
    assert keys == set(layers().state_dict())
    assert copy.deepcopy(model)[0].packed_weight is None


@needs_onednn
def test_captions_are_written_with_packed_decoders(tiny_model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    model = CoCa(tiny_model).eval()
    seen: list[int] = []
    original = coca.generate.Decoder

    class Spy(original):  # type: ignore[valid-type, misc]
        def step(self, tokens: torch.Tensor) -> torch.Tensor:
            seen.append(sum(each.packed_weight is not None for each in model.modules() if isinstance(each, Linear)))
            return super().step(tokens)

    monkeypatch.setattr(coca.generate, "Decoder", Spy)
    coca.generate.generate(model, torch.randn(2, 3, 16, 16), end_id=-1)
    assert len(seen) == 11
    assert set(seen) == {2 * 4 + 2 * 7 + 1}
    assert not any(each.packed_weight is not None for each in model.modules() if isinstance(each, Linear))


@needs_onednn
@pytest.mark.parametrize("options", [{}, {"beams": 4, "beam_groups": 2}], ids=["greedy", "beams"])
def test_packed_decoders_write_the_same_captions(
    tiny_model: ModelConfig, monkeypatch: pytest.MonkeyPatch, options: dict[str, int]
) -> None:
    torch.manual_seed(0)
    model = CoCa(tiny_model).eval()
    images, prompts = torch.randn(3, 3, 16, 16), torch.tensor([[1, 9, 8], [1, 7, 6], [1, 5, 4]])
    with_packing = coca.generate.generate(model, images, prompts_BP=prompts, end_id=-1, **options)
    monkeypatch.setattr(coca.generate, "packed", lambda *modules: nullcontext())
    without = coca.generate.generate(model, images, prompts_BP=prompts, end_id=-1, **options)
    assert with_packing.tokens_BT.tolist() == without.tokens_BT.tolist()
    torch.testing.assert_close(with_packing.log_probs_BT, without.log_probs_BT, rtol=1e-4, atol=1e-5)
