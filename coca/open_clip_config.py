"""open_clip's description of a CoCa model, read into our config."""

from collections.abc import Mapping
from typing import Any

from coca.config import ModelConfig
from coca.errors import BadInput
from coca.typed_config import build_config

# What a CoCa of open_clip is built from. A value given as None is read below; any other is the only one that is known.
_KNOWN: dict[str, dict[str, Any]] = {
    "vision_cfg": {
        "image_size": None,
        "layers": None,
        "width": None,
        "head_width": None,
        "mlp_ratio": None,
        "patch_size": None,
        "attn_pooler_queries": None,
        "attn_pooler_heads": None,
        "no_ln_pre": None,
        "patch_dropout": None,  # of training, not of the weights
        "attentional_pool": True,
        "output_tokens": True,
        "pos_embed_type": "learnable",
        "pool_type": "tok",
        "final_ln_after_pool": False,
    },
    "text_cfg": {
        "context_length": None,
        "vocab_size": None,
        "width": None,
        "heads": None,
        "layers": None,
        "mlp_ratio": None,
        "pad_id": None,
        "correct_cls_mask": None,
        "eos_id": None,  # of another kind of pooling
        "pool_type": None,  # overridden by the embedding token
        "tokenizer_mode": None,
        "tokenizer_kwargs": None,
        "hf_tokenizer_name": None,
        "embed_cls": True,
        "output_tokens": True,
        "proj_type": "linear",
        "proj_bias": False,
        "no_causal_mask": False,
        "final_ln_after_pool": False,
    },
    "multimodal_cfg": {
        "width": None,
        "heads": None,
        "layers": None,
        # Read by nobody: the decoder takes the text tower's vocabulary, always four times its width, and no pooler.
        "context_length": None,
        "vocab_size": None,
        "mlp_ratio": None,
        "dim_head": None,
        "n_queries": None,
        "attn_pooler_heads": None,
    },
}
_KNOWN_TOP = {"embed_dim", "vision_cfg", "text_cfg", "multimodal_cfg", "custom_text", "quick_gelu", "init_logit_scale"}
_CLIP_VOCABULARY = 49_408


def read_config(values: Mapping[str, Any], ids: Mapping[str, int] | None = None) -> ModelConfig:
    """Our config of a model that open_clip describes.

    Args:
        values: the model's JSON, or one that holds it under ``model_cfg`` (as published) or ``config``.
        ids: ``pad_id``, ``begin_id`` and ``end_id`` where they are not CLIP's.

    Raises:
        BadInput: a part is missing, or asks for something a CoCa here does not have; the key is named.
    """
    model = model_section(values)
    sections = {name: _section(model, name) for name in _KNOWN}
    vision, text, multimodal = sections.values()
    width, text_width = _number(vision, "width", 768), _number(text, "width", 512)
    _check_widths(_number(model, "embed_dim", None), text_width, _number(multimodal, "width", 512))
    image_size, patch_size = _number(vision, "image_size", 224), _number(vision, "patch_size", 16)
    heads, decoder_heads = _number(text, "heads", 8), _number(multimodal, "heads", 8)
    head_width, mlp_ratio = _number(vision, "head_width", 64), vision.get("mlp_ratio", 4.0)
    if width % head_width:
        raise BadInput(f"vision_cfg: head_width = {head_width} does not divide width = {width}", "Mend the JSON")
    if not isinstance(mlp_ratio, int | float) or mlp_ratio <= 0:
        raise BadInput(f"vision_cfg.mlp_ratio = {mlp_ratio!r} is no positive number", "Mend the model's JSON")
    text_layers, decoder_layers = _number(text, "layers", 12), _number(multimodal, "layers", 12)
    if text.get("mlp_ratio", 4) != 4:
        raise BadInput(f"text_cfg.mlp_ratio = {text['mlp_ratio']}: both decoders share one", "Only 4 is known here")
    vocab_size = _number(text, "vocab_size", _CLIP_VOCABULARY)
    special = {"pad_id": _number(text, "pad_id", 0)}
    if vocab_size == _CLIP_VOCABULARY:
        special |= {"begin_id": vocab_size - 2, "end_id": vocab_size - 1}
    return build_config(
        ModelConfig,
        {
            "vision": {
                "kind": "vit",
                "image_size": image_size,
                "patch_size": patch_size,
                "width": width,
                "layers": _number(vision, "layers", 12),
                "heads": width // head_width,
                "mlp_width": int(width * mlp_ratio),
                "class_token": True,
                "patch_bias": False,
                "pre_norm": not vision.get("no_ln_pre", False),
                "final_norm": False,
            },
            "text": {
                "vocab_size": vocab_size,
                "context_length": _number(text, "context_length", 77),
                "width": text_width,
                "heads": heads,
                "multimodal_heads": None if decoder_heads == heads else decoder_heads,
                "mlp_width": 4 * text_width,
                "unimodal_layers": text_layers,
                "multimodal_layers": decoder_layers,
                "multimodal_block": "open_clip",
                "embedding_slot": "open_clip_corrected" if text.get("correct_cls_mask") else "open_clip",
                **special,
                **(ids or {}),
            },
            "embed_dim": _number(model, "embed_dim", None),
            "pooling": "open_clip",
            "caption_queries": _number(vision, "attn_pooler_queries", 256),
            "pooler_heads": _number(vision, "attn_pooler_heads", 8),
        },
    )


def model_section(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The model's own part of a configuration file."""
    model = values.get("model_cfg", values.get("config", values))
    if not isinstance(model, Mapping):
        raise BadInput("the config holds no JSON object for the model", "Give --config open_clip's JSON of the model")
    unknown = sorted(set(model) - _KNOWN_TOP)
    if unknown or model.get("quick_gelu"):
        name = unknown[0] if unknown else "quick_gelu"
        raise BadInput(f"{name} = {model[name]!r} is not known of open_clip's CoCa", "Import a model without it")
    return model


def _section(model: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = model.get(name)
    if not isinstance(section, Mapping):
        raise BadInput(f"the config has no {name}", "Give --config open_clip's JSON of a CoCa model")
    for key, value in section.items():
        known = _KNOWN[name]
        harmless = key in known and (known[key] is None or known[key] == value)
        if not harmless and value not in (None, False):
            raise BadInput(f"{name}.{key} = {value!r} is not known of open_clip's CoCa", "Import a model without it")
        if not harmless and known.get(key):
            raise BadInput(f"{name}.{key} = {value!r}: a CoCa has {known[key]!r}", "Give the config of a CoCa")
    return section


def _number(section: Mapping[str, Any], key: str, default: int | None) -> int:
    value = section.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < (key != "pad_id"):
        raise BadInput(f"{key} = {value!r} is no positive number", "Mend the model's JSON")
    return value


def _check_widths(embed_dim: int, text: int, multimodal: int) -> None:
    if not embed_dim == text == multimodal:
        raise BadInput(
            f"embed_dim = {embed_dim}, text_cfg.width = {text}, multimodal_cfg.width = {multimodal} differ",
            "open_clip's decoder works on image and text tokens of one width: give the config of a CoCa",
        )
