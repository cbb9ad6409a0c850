"""CoCa weights in open_clip's layout, both ways without loss: names and shapes.

Every parameter of one side is one or more of the other laid end to end along the first axis, or its transpose. The same
map therefore carries gradients as well as weights.
"""

import io
import pickle
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from coca.config import ModelConfig
from coca.errors import BadInput
from coca.model import CoCa

Tensors = Mapping[str, Tensor]


def from_open_clip(tensors: Tensors, config: ModelConfig) -> dict[str, Tensor]:
    """Our state dict of open_clip's.

    Raises:
        BadInput: keys are missing, unknown or of another shape; each is named.
    """
    ours = _empty_state(config)
    tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    if "logit_scale" in tensors and tensors["logit_scale"].shape == (1,):
        tensors["logit_scale"] = tensors["logit_scale"].reshape(())
    _check(tensors, to_open_clip(ours, config))
    found: dict[str, Tensor] = {}
    for rule in _rules(config):
        joined = _join([tensors[key] for key in rule.theirs], rule)
        sizes = [ours[key].shape[0] for key in rule.ours] if len(rule.ours) > 1 else None
        parts = [joined] if sizes is None else joined.split(sizes)
        found |= dict(zip(rule.ours, (part.contiguous() for part in parts), strict=True))
    return found


def to_open_clip(state: Tensors, config: ModelConfig) -> dict[str, Tensor]:
    """open_clip's state dict of ours (or of anything with the same names and shapes, such as gradients).

    Raises:
        BadInput: the model has parts that open_clip's CoCa has not.
    """
    _check_exportable(config)
    found: dict[str, Tensor] = {}
    for rule in _rules(config):
        joined = _join([state[key] for key in rule.ours], rule)
        parts = [joined] if len(rule.theirs) == 1 else joined.chunk(len(rule.theirs))
        found |= dict(zip(rule.theirs, (part.contiguous() for part in parts), strict=True))
    return found


def read_weights(data: bytes, name: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file or of a torch pickle, which is read without running what is in it.

    Raises:
        BadInput: neither, or a pickle that holds more than tensors.
    """
    if data[:2] not in (b"PK", b"\x80\x02"):
        try:
            return safetensors.torch.load(data)
        except SafetensorError as error:
            raise BadInput(f"{name} is neither safetensors nor a torch file: {error}", "Give the weights") from None
    try:
        loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        way_out = "Save it again with safetensors, or as a state dict of tensors alone"
        raise BadInput(f"{name} holds more than tensors, or is damaged: {reason}", way_out) from None
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise BadInput(f"{name} holds no state dict", "Give a file of named tensors")
    return loaded


class _Rule(NamedTuple):
    """Ours and theirs, each laid end to end along the first axis, are the same, or each other's transpose."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    transposed: bool = False


def _rules(config: ModelConfig) -> Iterator[_Rule]:
    yield _Rule(("log_logit_scale",), ("logit_scale",))
    yield _Rule(("unimodal.embedding_token_D",), ("text.cls_emb",))
    yield _Rule(("unimodal.positions_TD",), ("text.positional_embedding",))
    yield _Rule(("text_projection.weight",), ("text.text_projection",), transposed=True)
    yield _Rule(("unimodal.token_embedding.weight",), ("text.token_embedding.weight",))
    for index in range(config.text.unimodal_layers):
        yield from _block(f"unimodal.blocks.{index}", f"text.transformer.resblocks.{index}")
    yield from _same("unimodal.norm", "text.ln_final")
    yield from _vision(config)
    yield _Rule(("multimodal.head.weight",), ("text_decoder.text_projection",), transposed=True)
    for index in range(config.text.multimodal_layers):
        yield from _cross_block(f"multimodal.blocks.{index}", index)
    yield from _same("multimodal.norm", "text_decoder.ln_final")


def _vision(config: ModelConfig) -> Iterator[_Rule]:
    assert config.vision.kind == "vit"
    yield _Rule(("vision.class_token_D",), ("visual.class_embedding",))
    yield _Rule(("vision.positions_SD",), ("visual.positional_embedding",))
    yield _Rule(("image_projection.weight",), ("visual.proj",), transposed=True)
    yield _Rule(("vision.patch_embedding.weight",), ("visual.conv1.weight",))
    if config.vision.pre_norm:
        yield from _same("vision.pre_norm", "visual.ln_pre")
    for index in range(config.vision.layers):
        yield from _block(f"vision.blocks.{index}", f"visual.transformer.resblocks.{index}")
    pooler, theirs = "caption_pooler", "visual.attn_pool"
    yield _Rule((f"{pooler}.queries_QD",), (f"{theirs}.query",))
    yield _Rule((f"{pooler}.query_projection.weight",), (f"{theirs}.attn.q_proj_weight",))
    yield _Rule((f"{pooler}.kv.weight",), (f"{theirs}.attn.k_proj_weight", f"{theirs}.attn.v_proj_weight"))
    yield _Rule((f"{pooler}.query_projection.bias", f"{pooler}.kv.bias"), (f"{theirs}.attn.in_proj_bias",))
    yield from _same(f"{pooler}.out", f"{theirs}.attn.out_proj")
    yield from _same(f"{pooler}.query_norm", f"{theirs}.ln_q")
    yield from _same(f"{pooler}.source_norm", f"{theirs}.ln_k")
    yield from _same(f"{pooler}.out_norm", "visual.ln_post")


def _block(ours: str, theirs: str) -> Iterator[_Rule]:
    yield from _same(f"{ours}.attention_norm", f"{theirs}.ln_1")
    yield from _self_attention(ours, theirs)
    yield from _mlp(f"{ours}.mlp_norm", f"{ours}.mlp", theirs)


def _cross_block(ours: str, index: int) -> Iterator[_Rule]:
    """One of ours is two of theirs: a block of self-attention, and one of cross-attention."""
    theirs = f"text_decoder.resblocks.{index}"
    yield from _same(f"{ours}.attention_norm", f"{theirs}.ln_1")
    yield from _self_attention(ours, theirs)
    yield from _mlp(f"{ours}.middle_norm", f"{ours}.middle_mlp", theirs)
    theirs, attention = f"text_decoder.cross_attn.{index}", f"{ours}.cross_attention"
    yield from _same(f"{ours}.cross_norm", f"{theirs}.ln_1")
    yield from _same(f"{ours}.source_norm", f"{theirs}.ln_1_kv")
    for part in ("weight", "bias"):
        yield _Rule((f"{attention}.q.{part}", f"{attention}.kv.{part}"), (f"{theirs}.attn.in_proj_{part}",))
    yield from _same(f"{attention}.out", f"{theirs}.attn.out_proj")
    yield from _mlp(f"{ours}.mlp_norm", f"{ours}.mlp", theirs)


def _self_attention(ours: str, theirs: str) -> Iterator[_Rule]:
    for part in ("weight", "bias"):
        yield _Rule((f"{ours}.attention.qkv.{part}",), (f"{theirs}.attn.in_proj_{part}",))
    yield from _same(f"{ours}.attention.out", f"{theirs}.attn.out_proj")


def _mlp(norm: str, mlp: str, theirs: str) -> Iterator[_Rule]:
    yield from _same(norm, f"{theirs}.ln_2")
    yield from _same(f"{mlp}.expand", f"{theirs}.mlp.c_fc")
    yield from _same(f"{mlp}.contract", f"{theirs}.mlp.c_proj")


def _same(ours: str, theirs: str) -> Iterator[_Rule]:
    for part in ("weight", "bias"):
        yield _Rule((f"{ours}.{part}",), (f"{theirs}.{part}",))


def _join(parts: list[Tensor], rule: _Rule) -> Tensor:
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    return joined.T if rule.transposed else joined


def _empty_state(config: ModelConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        return dict(CoCa(config).state_dict())


def _check(tensors: Tensors, expected: Tensors) -> None:
    problems = [f"{key} {tuple(value.shape)} is missing" for key, value in expected.items() if key not in tensors]
    problems += [f"{key} {tuple(value.shape)} is unknown" for key, value in tensors.items() if key not in expected]
    problems += [
        f"{key} has shape {tuple(tensors[key].shape)}, the config asks for {tuple(value.shape)}"
        for key, value in expected.items()
        if key in tensors and tensors[key].shape != value.shape
    ]
    problems += [
        f"{key} holds {value.dtype}, no floating-point numbers"
        for key, value in tensors.items()
        if not value.dtype.is_floating_point
    ]
    if problems:
        raise BadInput(
            f"the weights do not fit the config in {len(problems)} places: {'; '.join(sorted(problems))}",
            "Give --config the JSON of this very model",
        )


def _check_exportable(config: ModelConfig) -> None:
    vision, text = config.vision, config.text
    wanted: dict[str, tuple[object, object]] = {
        "vision.kind": (vision.kind, "vit"),
        "pooling": (config.pooling, "open_clip"),
        "text.multimodal_block": (text.multimodal_block, "open_clip"),
        "text.embedding_slot": (text.embedding_slot.removesuffix("_corrected"), "open_clip"),
        "text.tied_head": (text.tied_head, False),
        "embed_dim": (config.embed_dim, text.width),
        "initial_logit_bias": (config.initial_logit_bias, None),
    }
    if vision.kind == "vit":
        parts = {"class_token": True, "patch_bias": False, "final_norm": False, "qk_norm": False, "registers": 0}
        wanted |= {f"vision.{name}": (getattr(vision, name), value) for name, value in parts.items()}
    for name, (value, needed) in wanted.items():
        if value != needed:
            raise BadInput(
                f"open_clip's CoCa has no {name} = {value!r}, only {needed!r}",
                "Export a model that came from open_clip",
            )
