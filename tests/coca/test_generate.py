"""Captions with caches equal captions written the slow way, in float64, where ties cannot flake."""

import random
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from coca.config import GenerationConfig, ModelConfig, ResNetConfig
from coca.errors import BadInput
from coca.generate import _draws, generate
from coca.model import CoCa
from coca.packed import packed
from coca.typed_config import build_config
from tests.coca.generation_reference import search_one, write_one

BEGIN, END, PAD = 1, 2, 0
CASES = 510  # of each run; a third each greedy, sampled and searched


def random_model(tiny_model: ModelConfig, choose: random.Random) -> CoCa:
    """A small model of random make in float64, its vocabulary so small that captions end early, at different steps."""
    values = tiny_model.model_dump()
    values["text"] |= {
        "vocab_size": choose.choice([5, 6, 9, 17]),
        "context_length": choose.randint(5, 12),
        "unimodal_layers": choose.choice([1, 2]),
        "multimodal_layers": choose.choice([1, 2]),
        "multimodal_block": choose.choice(["paper", "open_clip"]),
        "embedding_slot": choose.choice(["after_caption", "open_clip"]),
        "tied_head": choose.random() < 0.2,
        "multimodal_heads": choose.choice([None, None, 4]),
    }
    values["pooling"] = choose.choice(["cascade", "parallel", "open_clip"])
    if choose.random() < 0.1:
        values["vision"] = ResNetConfig(image_size=16, blocks=(1, 1), width=4, groups=2, stem="small").model_dump()
    torch.manual_seed(choose.randrange(2**31))
    model = CoCa(build_config(ModelConfig, values)).double().eval()
    for parameter in model.parameters():
        parameter.data.add_(0.5 * torch.randn_like(parameter))
    return model


def random_prompts(model: CoCa, rows: int, choose: random.Random) -> list[list[int]]:
    text = model.config.text
    longest = choose.randint(1, min(4, text.context_length - 1))
    return [
        [BEGIN, *(choose.randrange(3, text.vocab_size) for _ in range(choose.randint(0, longest - 1)))]
        for _ in range(rows)
    ]


def random_options(model: CoCa, kind: str, choose: random.Random) -> dict[str, Any]:
    options: dict[str, Any] = {
        "max_length": choose.choice([None, model.config.text.context_length, 5]),
        "min_length": choose.choice([0, 0, 4]),
        "repetition_penalty": choose.choice([1.0, 1.0, 1.3]),
        "no_repeat_ngram": choose.choice([0, 0, 1, 2]),
        "force_end": choose.random() < 0.2,
    }
    if kind == "sampled":
        options |= {
            "temperature": choose.choice([0.5, 1.0, 2.0]),
            "top_k": choose.choice([0, 1, 3]),
            "top_p": choose.choice([1.0, 0.9, 0.3]),
            "seed": choose.randrange(1000),
        }
    if kind == "searched":
        groups = choose.choice([1, 1, 2, 3])
        options |= {
            "beams": groups * choose.choice([1, 2]) if groups > 1 else choose.choice([2, 3]),
            "beam_groups": groups,
            "diversity_penalty": choose.choice([0.0, 0.5, 3.0]),
            "length_penalty": choose.choice([0.0, 1.0, -0.5, 2.0]),
        }
    return options


@pytest.mark.parametrize("block", range(6))
def test_captions_equal_those_written_the_slow_way(tiny_model: ModelConfig, block: int) -> None:
    for case in range(block * CASES // 6, (block + 1) * CASES // 6):
        choose = random.Random(case)
        model = random_model(tiny_model, choose)
        kind = ("greedy", "sampled", "searched")[case % 3]
        rows = choose.randint(1, 4)
        images = torch.randn(rows, 3, 16, 16, dtype=torch.float64)
        prompts, options = random_prompts(model, rows, choose), random_options(model, kind, choose)
        found = generate(model, images, prompts_BP=padded(prompts), **options)
        config = build_config(GenerationConfig, options)
        uniforms = _draws(rows, model.config.text.context_length, config.seed).tolist()
        with torch.inference_mode():
            for row, prompt in enumerate(prompts):
                tokens, log_probs = (
                    search_one(model, images[row], prompt, config)
                    if kind == "searched"
                    else write_one(model, images[row], prompt, uniforms[row], config)
                )
                assert found.tokens_BT[row].tolist() == pad(tokens, found.tokens_BT.shape[1]), (case, kind, options)
                expected = torch.tensor(pad(log_probs, found.tokens_BT.shape[1]), dtype=torch.float64)
                torch.testing.assert_close(found.log_probs_BT[row], expected, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(found.image_features_BE, model.encode_image(images)[0])
            torch.testing.assert_close(found.text_features_BE, model.encode_text(found.tokens_BT))


def padded(rows: list[list[int]]) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([pad(row, longest) for row in rows])


def pad(row: list[Any], length: int) -> list[Any]:
    assert len(row) <= length
    return [*row, *[0] * (length - len(row))]


@pytest.fixture
def model(tiny_model: ModelConfig) -> CoCa:
    torch.manual_seed(0)
    model = CoCa(tiny_model).double().eval()
    for parameter in model.parameters():
        parameter.data.add_(0.5 * torch.randn_like(parameter))
    return model


IMAGES = torch.randn(3, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def test_a_row_does_not_depend_on_its_neighbours(model: CoCa) -> None:
    for options in ({}, {"temperature": 1.0, "seed": 3}, {"beams": 4, "beam_groups": 2}):
        together = generate(model, IMAGES, **options).tokens_BT[0].tolist()
        alone = generate(model, IMAGES[:1], **options).tokens_BT[0].tolist()
        assert together[: len(alone)] == alone
        assert not any(together[len(alone) :])


def test_the_seed_decides_the_draws(model: CoCa) -> None:
    once, again, other = (generate(model, IMAGES, temperature=1.0, seed=seed).tokens_BT.tolist() for seed in (1, 1, 2))
    assert once == again != other


def test_max_length_cuts_and_force_end_ends(model: CoCa) -> None:
    cut = generate(model, IMAGES, end_id=-1, max_length=5).tokens_BT
    assert cut.shape == (3, 5)
    assert (cut[:, 0] == BEGIN).all()
    assert (generate(model, IMAGES, max_length=5, force_end=True, min_length=5).tokens_BT[:, -1] == END).all()


def test_groups_avoid_each_other(model: CoCa) -> None:
    """With a large penalty the second group begins with other tokens than the first."""
    import coca.beam_search as module

    seen: list[Tensor] = []
    original = module._advance

    def spy(running: Any, *rest: Any) -> Tensor:
        parents = original(running, *rest)
        seen.append(running.tokens_IGNT[..., 1].clone())
        return parents

    module._advance = spy
    try:
        generate(model, IMAGES, beams=4, beam_groups=2, diversity_penalty=1e3)
    finally:
        module._advance = original
    first, second = seen[0][:, 0], seen[0][:, 1]
    assert all(not set(a.tolist()) & set(b.tolist()) for a, b in zip(first, second, strict=True))


def test_more_beams_find_a_likelier_caption(model: CoCa) -> None:
    options = {"end_id": -1, "max_length": 6, "length_penalty": 0.0}
    greedy = generate(model, IMAGES, end_id=-1, max_length=6).log_probs_BT.sum(dim=1)
    searched = generate(model, IMAGES, beams=64, **options).log_probs_BT.sum(dim=1)
    assert (searched >= greedy - 1e-9).all()
    assert (searched > greedy + 1e-6).any()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_steps_give_the_same_tokens(model: CoCa) -> None:
    """Fixed shapes: one graph for all steps of a caption."""
    torch._dynamo.reset()
    prompts = torch.tensor([[1, 9, 8], [1, 7, 0], [1, 0, 0]])
    for options in ({}, {"temperature": 1.0, "seed": 4}):
        plain = generate(model, IMAGES, prompts_BP=prompts, **options)
        with torch._dynamo.config.patch(error_on_recompile=True):
            compiled = generate(model, IMAGES, prompts_BP=prompts, compiled=True, **options)
        assert compiled.tokens_BT.tolist() == plain.tokens_BT.tolist()
        torch.testing.assert_close(compiled.log_probs_BT, plain.log_probs_BT)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_steps_come_in_more_shapes_than_torch_compiles_by_default(model: CoCa) -> None:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=1), packed(model):  # nor does packing trouble them
        for length in (4, 5, 6):
            plain = generate(model, IMAGES, end_id=-1, max_length=length).tokens_BT
            compiled = generate(model, IMAGES, end_id=-1, max_length=length, compiled=True).tokens_BT
            assert compiled.tolist() == plain.tolist()


def test_half_precision_draws_among_all_tokens(tiny_model: ModelConfig) -> None:
    """Summed in bfloat16, probabilities of a few thousandths would vanish beside their sum."""
    torch.manual_seed(0)
    model = CoCa(tiny_model).bfloat16().eval()
    generation = generate(model, IMAGES[:1].bfloat16().expand(64, -1, -1, -1), temperature=4.0, end_id=-1)
    assert generation.log_probs_BT.dtype == torch.float32
    assert len(set(generation.tokens_BT.flatten().tolist())) > 250  # 640 draws from 320 near-equal tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beems": 3}, "unknown config key 'beems'. Did you mean 'beams'"),
        ({"beams": 4, "beam_groups": 3}, "beam_groups = 3 does not divide beams = 4"),
        ({"beams": 2, "temperature": 1.0}, "search or sample, not both"),
        ({"min_length": 9, "max_length": 5}, "min_length = 9 is above max_length = 5"),
        ({"top_p": 0.0}, "'top_p' = 0.0"),
        ({"compiled": True, "beams": 2}, "beams change their order"),
        ({"min_length": 13}, "min_length = 13 is above 12, the longest caption"),
        ({"prompts_BP": torch.tensor([[1, 7, 0, 8]] * 3)}, "holds the padding token 0 before its end"),
        ({"prompts_BP": torch.ones(2, 1, dtype=torch.int64)}, "2 prompts for 3 images"),
        ({"prompts_BP": torch.tensor([[1], [1], [0]])}, "a prompt is empty"),
        ({"prompts_BP": torch.ones(3, 12, dtype=torch.int64)}, "a prompt of 12 tokens leaves no room"),
    ],
)
def test_options_that_do_not_fit_are_refused(model: CoCa, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        generate(model, IMAGES, **options)


def test_no_images_are_refused(model: CoCa) -> None:
    with pytest.raises(BadInput, match="there are no images to caption"):
        generate(model, IMAGES[:0])
