"""The architecture: what sees what, and that nothing is left to chance."""

import math

import pytest
import torch
from torch import Tensor

from coca.config import ModelConfig, ResNetConfig, TextConfig, ViTConfig
from coca.errors import BadInput
from coca.model import CoCa
from coca.objective import Objective
from coca.train_config import LossConfig
from coca.typed_config import build_config
from coca.variants import VARIANTS


def varied(config: ModelConfig, seed: int = 0) -> CoCa:
    """A model in float64 with every parameter away from its start value, so that no part is the identity."""
    torch.manual_seed(seed)
    model = CoCa(config).double().eval()
    for parameter in model.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture
def model(tiny_model: ModelConfig) -> CoCa:
    return varied(tiny_model)


def images(count: int, size: int = 16) -> Tensor:
    return torch.randn(count, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def changed(config: ModelConfig, **fields: object) -> ModelConfig:
    """The config with fields such as ``text__tied_head`` changed."""
    values = config.model_dump()
    for name, value in fields.items():
        part, _, key = name.rpartition("__")
        (values[part] if part else values)[key] = value
    return build_config(ModelConfig, values)


def test_shapes_and_unit_length(model: CoCa) -> None:
    output = model(images(2), torch.tensor([[1, 9, 8, 2], [1, 9, 2, 0]]))
    assert output.image_features.shape == output.text_features.shape == (2, 8)
    assert output.logits.shape == (2, 3, 320)
    torch.testing.assert_close(output.image_features.norm(dim=-1), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(output.text_features.norm(dim=-1), torch.ones(2, dtype=torch.float64))
    assert output.logit_scale.ndim == 0


SLOTS = ("after_caption", "open_clip", "open_clip_corrected")


@pytest.mark.parametrize("slot", SLOTS)
def test_the_embedding_token_sees_every_token(tiny_model: ModelConfig, slot: str) -> None:
    """Bites when the embedding token is placed first: it would see nothing of the caption."""
    model = varied(changed(tiny_model, text__embedding_slot=slot))
    before = model.encode_text(torch.tensor([[1, 9, 8, 7, 2]]))
    for position in range(5):
        tokens = torch.tensor([[1, 9, 8, 7, 2]])
        tokens[0, position] = 30
        assert (model.encode_text(tokens) - before).abs().max() > 1e-4, position


@pytest.mark.parametrize("slot", SLOTS)
def test_no_caption_token_sees_the_embedding_token(tiny_model: ModelConfig, slot: str) -> None:
    model = varied(changed(tiny_model, text__embedding_slot=slot))
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


@pytest.mark.parametrize("slot", SLOTS)
def test_padding_changes_nothing(tiny_model: ModelConfig, slot: str) -> None:
    model = varied(changed(tiny_model, text__embedding_slot=slot))
    short = torch.tensor([[1, 9, 2]])
    for width in (1, 3, 9):  # 12 positions in all
        padded = torch.tensor([[1, 9, 2, *[0] * width]])
        a, b = model(images(1), short), model(images(1), padded)
        torch.testing.assert_close(b.text_features, a.text_features, rtol=0, atol=1e-12)
        torch.testing.assert_close(b.logits[:, :2], a.logits, rtol=0, atol=1e-12)


def test_padding_within_a_caption_is_a_token(model: CoCa) -> None:
    """In CLIP's vocabulary the padding id is the exclamation mark as well."""
    before = model.encode_text(torch.tensor([[1, 0, 9, 2, 0]]))
    torch.testing.assert_close(model.encode_text(torch.tensor([[1, 0, 9, 2]])), before, rtol=0, atol=1e-12)
    assert (model.encode_text(torch.tensor([[1, 0, 9, 5]])) - before).abs().max() > 1e-4


def test_open_clips_shift_shows_the_first_padding(tiny_model: ModelConfig) -> None:
    """The shift of open_clip issue 549: the padding's embedding matters, the embedding token's own key does not."""
    for slot, sees_padding in (("open_clip", True), ("open_clip_corrected", False), ("after_caption", False)):
        model = varied(changed(tiny_model, text__embedding_slot=slot))
        before = model.encode_text(torch.tensor([[1, 9, 2, 0, 0]]))
        model.unimodal.token_embedding.weight.data[0].add_(torch.linspace(-1, 1, 16))
        difference = (model.encode_text(torch.tensor([[1, 9, 2, 0, 0]])) - before).abs().max()
        assert (difference > 1e-4) == sees_padding, slot


@pytest.mark.parametrize("slot", SLOTS)
def test_a_caption_may_fill_the_context(tiny_model: ModelConfig, slot: str) -> None:
    model = varied(changed(tiny_model, text__embedding_slot=slot))
    assert model(images(1), torch.full((1, 12), 9)).logits.shape == (1, 11, 320)
    with pytest.raises(ValueError, match="captions of 13 tokens: at most 12"):
        model(images(1), torch.full((1, 13), 9))


def test_the_caption_sees_the_image_and_the_embedding_does_not(model: CoCa) -> None:
    tokens = torch.tensor([[1, 9, 8, 2]] * 2)
    output = model(images(2), tokens)
    assert (output.logits[0] - output.logits[1]).abs().max() > 1e-4
    torch.testing.assert_close(output.text_features[0], output.text_features[1])


@pytest.mark.parametrize(("pooling", "depends"), [("cascade", True), ("parallel", False), ("open_clip", True)])
def test_whether_the_embedding_depends_on_the_captioning_queries(
    tiny_model: ModelConfig, pooling: str, depends: bool
) -> None:
    model = varied(changed(tiny_model, pooling=pooling))
    before, tokens = model.encode_image(images(1))
    assert tokens.shape == (1, 3 - (pooling == "open_clip"), 16)
    model.caption_pooler.queries_QD.data.add_(torch.randn_like(model.caption_pooler.queries_QD))
    after, _ = model.encode_image(images(1))
    assert ((after - before).abs().max() > 1e-4) == depends


def test_the_blocks_of_the_decoder(tiny_model: ModelConfig) -> None:
    """open_clip's has a second MLP and a norm on the image tokens; the paper's has one MLP."""
    paper, open_clip = (CoCa(changed(tiny_model, text__multimodal_block=name)) for name in ("paper", "open_clip"))
    mlp, norm = 2 * 16 * 32 + 16 + 32, 2 * 16
    added = sum(p.numel() for p in open_clip.parameters()) - sum(p.numel() for p in paper.parameters())
    assert added == 2 * (mlp + 2 * norm)  # two blocks


@pytest.mark.parametrize("pooling", ["cascade", "parallel", "open_clip"])
@pytest.mark.parametrize("encoder", ["vit", "vit with everything", "resnet"])
@pytest.mark.parametrize("recompute", [False, True])
def test_every_parameter_takes_part(tiny_model: ModelConfig, pooling: str, encoder: str, recompute: bool) -> None:
    visions = {
        "vit": tiny_model.vision,
        "vit with everything": tiny_model.vision.model_copy(
            update={"class_token": True, "registers": 2, "qk_norm": True, "pre_norm": True}
        ),
        "resnet": ResNetConfig(image_size=16, blocks=(1, 2), width=4, groups=2, stem="small"),
    }
    config = changed(tiny_model, pooling=pooling, initial_logit_bias=-10.0).model_copy(
        update={"vision": visions[encoder]}
    )
    model = varied(config)
    model.checkpoint_activations(recompute)
    output = model(images(2), torch.tensor([[1, 9, 8, 2], [1, 9, 2, 0]]))
    assert model.logit_bias is not None
    loss = output.logits.square().sum() + (output.image_features[0] * output.text_features[1]).sum()
    (loss + output.logit_scale + model.logit_bias).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


def test_recomputing_activations_changes_no_gradient(tiny_model: ModelConfig) -> None:
    gradients = []
    for recompute in (False, True):
        model = varied(tiny_model)
        model.checkpoint_activations(recompute)
        model(images(2), torch.tensor([[1, 9, 8, 2]] * 2)).logits.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["small", "small_resnet"])
def test_every_parameter_is_initialised(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is filled with NaN before it is initialised: a parameter that is forgotten stays NaN."""
    config = VARIANTS[name]()
    everything = {"class_token": True, "registers": 2, "qk_norm": True, "pre_norm": True}
    if config.vision.kind == "vit":
        config = config.model_copy(update={"vision": config.vision.model_copy(update=everything)})
    config = changed(config, text__multimodal_block="open_clip", initial_logit_bias=-10.0)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        model = CoCa(config)
    finally:
        torch.use_deterministic_algorithms(False)
    for parameter_name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), parameter_name
        assert parameter.abs().max() <= 10, parameter_name
    assert model.logit_scale.item() == pytest.approx(1 / 0.07, rel=1e-6)


def test_logit_scale_is_held_in_its_range_and_can_come_back(model: CoCa) -> None:
    model.log_logit_scale.data.fill_(math.log(500))
    model.clamp_logit_scale()
    assert model.logit_scale.item() == pytest.approx(100)
    model.logit_scale.backward()
    assert model.log_logit_scale.grad is not None
    assert model.log_logit_scale.grad.item() == pytest.approx(100)
    model.log_logit_scale.data.fill_(-1)
    model.clamp_logit_scale()
    assert model.logit_scale.item() == 1


def test_head_is_tied_only_where_asked(tiny_model: ModelConfig) -> None:
    for tied in (False, True):
        model = CoCa(changed(tiny_model, text__tied_head=tied))
        assert (model.head_VD is model.unimodal.token_embedding.weight) == tied
        assert ("multimodal.head.weight" in model.state_dict()) != tied


def test_without_embed_dim_there_is_no_projection(tiny_model: ModelConfig) -> None:
    model = CoCa(changed(tiny_model, embed_dim=None))
    assert not [name for name, _ in model.named_parameters() if "projection" in name]
    assert model.config.embedding_width == 16
    assert model.encode_text(torch.tensor([[1, 2]])).shape == (1, 16)


@pytest.mark.parametrize("name", ["small", "small_resnet", "open_clip"])
def test_bfloat16_is_close_to_float32(name: str) -> None:
    config = VARIANTS["small" if name == "open_clip" else name]()
    if name == "open_clip":
        everything = {"class_token": True, "registers": 2, "qk_norm": True, "pre_norm": True}
        config = config.model_copy(update={"vision": config.vision.model_copy(update=everything)})
        config = changed(config, text__multimodal_block="open_clip", text__embedding_slot="open_clip")
        config = changed(config, pooling="open_clip")
    torch.manual_seed(0)
    model = CoCa(config)
    pixels, tokens = torch.randn(4, 3, 48, 48), torch.tensor([[1, 9, 8, 2], [1, 9, 2, 0]] * 2)
    gradients = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses = Objective(model, LossConfig())(pixels, tokens)
        sum(losses).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    dot, lengths = 0.0, [0.0, 0.0]
    for pair in zip(*gradients, strict=True):
        dot += float((pair[0] * pair[1]).sum())
        lengths = [length + float(gradient.square().sum()) for length, gradient in zip(lengths, pair, strict=True)]
    assert dot / math.sqrt(lengths[0] * lengths[1]) > 0.99


@pytest.mark.parametrize("name", ["small", "small_resnet"])
def test_the_model_is_one_graph(name: str) -> None:
    """torch.compile without a break: ``fullgraph`` raises at the first."""
    torch._dynamo.reset()
    model = CoCa(VARIANTS[name]())
    size = model.config.vision.image_size
    compiled = torch.compile(model.states, fullgraph=True, backend="eager")
    pixels, tokens = torch.randn(2, 3, size, size), torch.tensor([[1, 9, 8, 2], [1, 9, 2, 0]])
    for got, expected in zip(compiled(pixels, tokens), model.states(pixels, tokens), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (ViTConfig, {"image_size": 48, "patch_size": 7}, "patch_size = 7 does not divide image_size = 48"),
        (ViTConfig, {"width": 100, "heads": 12}, "heads = 12 does not divide width = 100"),
        (ResNetConfig, {"image_size": 100}, "the stride of all stages = 32 does not divide image_size = 100"),
        (ResNetConfig, {"groups": 5}, "groups = 5 does not divide width = 64"),
        (TextConfig, {"width": 100, "heads": 12}, "heads = 12 does not divide width = 100"),
        (ModelConfig, {"pooler_heads": 5}, "pooler_heads = 5 does not divide text.width = 768"),
        (ModelConfig, {"pooling": "open_clip", "caption_queries": 1}, "caption_queries = 1 leaves no image token"),
    ],
)
def test_a_config_that_does_not_fit_itself_is_refused(kind: type, values: dict[str, object], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        build_config(kind, values)
