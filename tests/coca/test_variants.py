"""Variants have the parameters of the models they name."""

import pytest
import torch

from coca.errors import BadInput
from coca.model import CoCa
from coca.variants import VARIANTS, variant

MILLION = 1e6


def counts(name: str) -> tuple[int, int, int]:
    """(image encoder, both decoders with embedding and head, everything)."""
    with torch.device("meta"):
        model = CoCa(VARIANTS[name]())
    parts = (model.vision, torch.nn.ModuleList([model.unimodal, model.multimodal]), model)
    return tuple(sum(p.numel() for p in part.parameters()) for part in parts)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("name", "encoder", "text"),
    # Yu et al. 2022, table 1; for the largest, whose figures are printed with two digits, by its layers and widths.
    [("base", 86, 297), ("large", 303, 484), ("giant", 1009, 1179)],
)
def test_the_papers_models_have_its_parameters(name: str, encoder: float, text: float) -> None:
    found_encoder, found_text, everything = counts(name)
    assert found_encoder == pytest.approx(encoder * MILLION, rel=0.01)
    assert found_text == pytest.approx(text * MILLION, rel=0.01)
    # The table's total is that of encoder and decoders; with the poolers, which it does not count, still within 1 %.
    assert found_encoder + found_text == pytest.approx((encoder + text) * MILLION, rel=0.01)
    assert everything == pytest.approx((encoder + text) * MILLION, rel=0.01)


@pytest.mark.parametrize(("name", "total"), [("coca_ViT-B-32", 253_560_065), ("coca_ViT-L-14", 638_450_177)])
def test_open_clips_models_have_its_parameters_exactly(name: str, total: int) -> None:
    assert counts(name)[2] == total


def test_an_unknown_variant_is_refused_with_those_there_are() -> None:
    with pytest.raises(BadInput, match=r"there is no variant 'huge'\. Known are base, large, giant"):
        variant("huge")
