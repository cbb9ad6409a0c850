"""A model that open_clip made gives open_clip's numbers here, and goes back to it bit for bit.

`tests/data/open_clip_parity/` was made with open_clip 3.3.0 in float32 on a CPU; every parameter is away from its start
value, so that no layer is the identity.
"""

import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from coca.config import ModelConfig
from coca.errors import BadInput
from coca.generate import generate
from coca.losses import captioning_loss, contrastive_loss
from coca.model import CoCa
from coca.open_clip import from_open_clip, read_weights, to_open_clip
from coca.open_clip_config import read_config
from coca.variants import VARIANTS

PARITY = Path(__file__).parents[1] / "data" / "open_clip_parity"
IDS = {"begin_id": 1, "end_id": 2}


def tensors(name: str) -> dict[str, Tensor]:
    return read_weights((PARITY / f"{name}.safetensors").read_bytes(), name)


def case() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((PARITY / "case.json").read_text())
    return loaded


@pytest.fixture
def config() -> ModelConfig:
    return read_config(case(), IDS)


@pytest.fixture
def model(config: ModelConfig) -> CoCa:
    model = CoCa(config)
    model.load_state_dict(from_open_clip(tensors("weights"), config))
    return model.eval()


def test_outputs_are_open_clips(model: CoCa) -> None:
    io_ = tensors("io")
    output = model(io_["image"], io_["text"])
    for name in ("image_features", "text_features", "logits"):
        torch.testing.assert_close(getattr(output, name), io_[name], rtol=0, atol=2e-5)
    torch.testing.assert_close(output.logit_scale, io_["logit_scale"][0], rtol=1e-6, atol=0)


def test_outputs_do_not_need_the_padding(model: CoCa) -> None:
    """open_clip pads to the whole context; here the batch's longest caption is enough."""
    io_ = tensors("io")
    real = int((io_["text"] != 0).sum(dim=1).max())
    assert real < io_["text"].shape[1]
    output = model(io_["image"], io_["text"][:, :real])
    torch.testing.assert_close(output.text_features, io_["text_features"], rtol=0, atol=2e-5)
    torch.testing.assert_close(output.logits, io_["logits"][:, : real - 1], rtol=0, atol=2e-5)


def test_losses_and_gradients_are_open_clips(model: CoCa, config: ModelConfig) -> None:
    io_, expected = tensors("io"), case()
    output = model(io_["image"], io_["text"])
    contrastive = contrastive_loss(output.image_features, output.text_features, output.logit_scale)
    captioning = expected["caption_loss_weight"] * captioning_loss(output.logits, io_["text"], pad_id=0)
    assert contrastive.item() == pytest.approx(expected["losses"]["contrastive_loss"], abs=1e-5)
    assert captioning.item() == pytest.approx(expected["losses"]["caption_loss"], abs=1e-5)
    (contrastive + captioning).backward()
    # The map of weights carries gradients as well: both sides are the same numbers, laid out differently.
    gradients = to_open_clip({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, config)
    norms = tensors("grad_norms")
    assert norms.keys() <= gradients.keys()
    for name, norm in norms.items():
        assert gradients[name].norm().item() == pytest.approx(norm.item(), rel=1e-4), name


def test_greedy_tokens_are_open_clips(model: CoCa) -> None:
    expected = tensors("greedy")["greedy"]
    assert generate(model, tensors("io")["image"], force_end=True).tokens_BT.tolist() == expected.tolist()


def test_export_gives_back_the_same_bits(model: CoCa, config: ModelConfig) -> None:
    exported, given = to_open_clip(model.state_dict(), config), tensors("weights")
    assert exported.keys() == given.keys()
    for name, value in given.items():
        assert exported[name].dtype == value.dtype
        assert exported[name].shape == value.shape
        assert torch.equal(exported[name], value), name


def test_half_precision_survives(config: ModelConfig) -> None:
    given = {name: value.half() for name, value in tensors("weights").items()}
    exported = to_open_clip(from_open_clip(given, config), config)
    assert all(torch.equal(exported[name], value) for name, value in given.items())


@pytest.mark.parametrize("name", ["coca_ViT-B-32", "coca_ViT-L-14"])
def test_the_published_models_have_these_keys_and_shapes(name: str) -> None:
    config = VARIANTS[name]()
    with torch.device("meta"):
        exported = to_open_clip(CoCa(config).state_dict(), config)
    expected = json.loads((PARITY / f"keys_{name}.json").read_text())
    assert {key: list(value.shape) for key, value in exported.items()} == expected


def test_the_variant_is_what_open_clips_own_config_says() -> None:
    values = {
        "embed_dim": 512,
        "vision_cfg": {
            "image_size": 224,
            "layers": 12,
            "width": 768,
            "patch_size": 32,
            "attentional_pool": True,
            "attn_pooler_heads": 8,
            "output_tokens": True,
        },
        "text_cfg": {
            "context_length": 76,
            "vocab_size": 49408,
            "width": 512,
            "heads": 8,
            "layers": 12,
            "embed_cls": True,
            "output_tokens": True,
        },
        "multimodal_cfg": {"context_length": 76, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
        "custom_text": True,
    }
    assert read_config(values) == read_config({"model_cfg": values}) == VARIANTS["coca_ViT-B-32"]()


def test_wrappings_of_training_are_taken_off(config: ModelConfig) -> None:
    given = tensors("weights")
    wrapped = {f"module.{name}": value for name, value in given.items()}
    wrapped["module.logit_scale"] = wrapped["module.logit_scale"].reshape(1)
    buffer = io.BytesIO()
    torch.save({"epoch": 3, "state_dict": wrapped}, buffer)
    state = from_open_clip(read_weights(buffer.getvalue(), "epoch_3.pt"), config)
    assert all(torch.equal(state[name], value) for name, value in from_open_clip(given, config).items())


class Attack:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (eval, (f"open({str(self.target)!r}, 'w').close()",))


@pytest.mark.parametrize("modern", [True, False])
def test_a_pickle_is_never_run(tmp_path: Path, modern: bool) -> None:
    buffer = io.BytesIO()
    if modern:
        torch.save({"state_dict": {"logit_scale": Attack(tmp_path / "ran")}}, buffer)
    else:
        pickle.dump({"logit_scale": Attack(tmp_path / "ran")}, buffer, protocol=2)
    with pytest.raises(BadInput, match="holds more than tensors"):
        read_weights(buffer.getvalue(), "weights.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 but no more", b"\x80\x02}.", b"hello", b"\xff" * 100])
def test_damaged_files_are_refused(data: bytes) -> None:
    with pytest.raises(BadInput):
        from_open_clip(read_weights(data, "weights"), read_config(case()))


def test_every_mismatch_is_named_by_key_and_shape(config: ModelConfig) -> None:
    given = tensors("weights")
    given["visual.proj"] = torch.zeros(48, 47)
    given["visual.extra"] = given.pop("text.cls_emb")
    given["text.ln_final.bias"] = given["text.ln_final.bias"].long()
    with pytest.raises(BadInput) as caught:
        from_open_clip(given, config)
    for part in (
        "in 4 places",
        "text.cls_emb (48,) is missing",
        "visual.extra (48,) is unknown",
        "visual.proj has shape (48, 47), the config asks for (48, 48)",
        "text.ln_final.bias holds torch.int64",
    ):
        assert part in caught.value.cause


def changed(path: str, value: object) -> dict[str, Any]:
    model = case()["config"]
    section, _, key = path.rpartition(".")
    (model[section] if section else model)[key] = value
    return {key: value for key, value in model.items() if value is not None}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("multimodal_cfg", None, "the config has no multimodal_cfg"),
        ("embed_dim", 40, "embed_dim = 40, text_cfg.width = 48, multimodal_cfg.width = 48 differ"),
        ("quick_gelu", True, "quick_gelu = True is not known"),
        ("unheard_of", 1, "unheard_of = 1 is not known"),
        ("vision_cfg.timm_model_name", "vit", "vision_cfg.timm_model_name = 'vit' is not known"),
        ("vision_cfg.ls_init_value", 0.1, "vision_cfg.ls_init_value = 0.1 is not known"),
        ("vision_cfg.attentional_pool", "cascade", "vision_cfg.attentional_pool = 'cascade' is not known"),
        ("vision_cfg.attentional_pool", False, "vision_cfg.attentional_pool = False: a CoCa has True"),
        ("text_cfg.hf_model_name", "roberta", "text_cfg.hf_model_name = 'roberta' is not known"),
        ("text_cfg.embed_cls", False, "text_cfg.embed_cls = False: a CoCa has True"),
        ("vision_cfg.layers", "many", "layers = 'many' is no positive number"),
        ("vision_cfg.mlp_ratio", "four", "vision_cfg.mlp_ratio = 'four' is no positive number"),
        ("vision_cfg.head_width", 24, "head_width = 24 does not divide width = 64"),
        ("multimodal_cfg.heads", 5, "multimodal_heads = 5 does not divide width = 48"),
        ("vision_cfg.patch_size", 7, "patch_size = 7 does not divide image_size = 32"),
    ],
)
def test_configs_that_are_not_a_coca_are_refused(path: str, value: object, message: str) -> None:
    with pytest.raises(BadInput, match=message.replace(".", r"\.")):
        read_config(changed(path, value), IDS)


def test_options_that_change_no_number_are_accepted(config: ModelConfig) -> None:
    values = changed("vision_cfg.patch_dropout", 0.5)
    values["text_cfg"] |= {"pool_type": "argmax", "no_causal_mask": False, "hf_model_name": None}
    assert read_config(values, IDS) == config


def test_the_decoder_may_have_heads_of_its_own(config: ModelConfig) -> None:
    assert config.text.multimodal_heads is None
    assert read_config(changed("multimodal_cfg.heads", 6)).text.decoder_heads == 6
    values = case()["config"]
    del values["multimodal_cfg"]["heads"]  # open_clip's default, whatever the text tower has
    assert read_config(values).text.decoder_heads == 8


def test_the_mask_without_the_shift_is_an_option_of_the_config() -> None:
    assert read_config(changed("text_cfg.correct_cls_mask", True)).text.embedding_slot == "open_clip_corrected"


@pytest.mark.parametrize("name", ["base", "small", "small_resnet"])
def test_models_that_open_clip_does_not_have_are_not_exported(name: str) -> None:
    config = VARIANTS[name]()
    with torch.device("meta"):
        state = CoCa(config).state_dict()
    with pytest.raises(BadInput, match="open_clip's CoCa has no"):
        to_open_clip(state, config)


def test_safetensors_and_pickle_give_the_same() -> None:
    given = {name: value for name, value in tensors("weights").items() if name.startswith("text.ln")}
    buffer = io.BytesIO()
    torch.save(given, buffer)
    loaded = read_weights(buffer.getvalue(), "a")
    assert all(torch.equal(read_weights(safetensors.torch.save(given), "b")[name], loaded[name]) for name in given)
