"""Weights from open_clip's layout and back to it: what `coca weights import` and `coca weights export` do."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from coca.checkpoint import check_tokenizer, load_tensors, save_checkpoint
from coca.config import ModelConfig, Preprocessing
from coca.cost import parameters
from coca.errors import BadInput
from coca.model import CoCa
from coca.open_clip import from_open_clip, read_weights, to_open_clip
from coca.open_clip_config import model_section, read_config
from coca.storage import Store, open_file
from coca.tokenizer import Tokenizer, clip_tokenizer
from coca.typed_config import build_config
from coca.variants import VARIANTS

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_GZIP = b"\x1f\x8b"
# Their names for the ids, beside the model's part of a JSON.
_JSON_IDS = {"pad_id": "pad_id", "begin_id": "sot_id", "end_id": "eot_id"}
# What pictures go through here; None stands for whatever is read, or does not matter.
_PREPROCESSING = {
    "mean": None,
    "std": None,
    "size": None,
    "fill_color": None,
    "mode": "RGB",
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


def import_open_clip(
    file: str, config_file: str, out: str, *, tokenizer_file: Path | None = None, ids: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """Make a checkpoint ``out`` of open_clip's weights, which keep their precision.

    Args:
        file: safetensors or a torch pickle, local or s3://.
        config_file: open_clip's JSON of the model.
        tokenizer_file: CLIP's vocabulary or a tokenizer.json; without one the checkpoint has none.
        ids: ``pad_id``, ``begin_id``, ``end_id`` that go before those of the JSON.

    Raises:
        BadInput: a file cannot be read or does not fit the others, or ``out`` holds something.
    """
    store, name = _new_folder(out)
    values = _read_json(config_file)
    config = _model_config(values, ids or {})
    preprocessing = _preprocessing(values, config, config_file)
    tokenizer = None if tokenizer_file is None else _tokenizer(tokenizer_file, config)
    data = _read(file, "weights")
    tensors = read_weights(data, file)
    with torch.device("meta"):
        model = CoCa(config)
    model.load_state_dict(from_open_clip(tensors, config), assign=True)
    provenance = {
        "imported_from": "open_clip",
        "file": open_file(file)[1],
        "sha256": hashlib.sha256(data).hexdigest(),
        "open_clip_config": model_section(values),
        "logit_scale_shape": list(_scale_shape(tensors)),
    }
    save_checkpoint(
        store, name, model=model, tokenizer=tokenizer, preprocessing=preprocessing, step=0, provenance=provenance
    )
    return {
        "out": out,
        "parameters": sum(parameters(config).values()),
        "variant": next((name for name, make in VARIANTS.items() if make() == config), None),
        "dtypes": sorted({str(value.dtype).removeprefix("torch.") for value in tensors.values()}),
        "tokenizer": tokenizer.fingerprint if tokenizer else None,
        "model": config.model_dump(mode="json"),
        "preprocessing": preprocessing.model_dump(mode="json"),
        "sha256": provenance["sha256"],
    }


def export_open_clip(checkpoint: str, out: str) -> dict[str, Any]:
    """Write a checkpoint's weights as open_clip's safetensors, bit for bit those that were imported.

    Beside them goes open_clip's JSON of the model, where the checkpoint was imported with one.

    Raises:
        BadInput: open_clip has no such model, or there is a file in the way.
    """
    store, name = open_file(out)
    store.check_folder("--out")
    stem = name.removesuffix(".safetensors")
    if stem in ("", name):
        raise BadInput(f"--out {out} does not end with .safetensors", f"Name it {out}.safetensors")
    _check_free(store, name)
    tensors, described = load_tensors(checkpoint)
    exported = to_open_clip(tensors, described.model)
    if described.provenance.get("logit_scale_shape") == [1]:
        exported["logit_scale"] = exported["logit_scale"].reshape(1)
    config = described.provenance.get("open_clip_config")
    if config is not None:
        _check_free(store, f"{stem}.json")
        store.write(f"{stem}.json", json.dumps(config, indent=2).encode())
    store.write(name, safetensors.torch.save(exported, metadata={"format": "pt"}))
    return {
        "out": out,
        "config": f"{out.removesuffix('safetensors')}json" if config is not None else None,
        "tensors": len(exported),
        "parameters": sum(value.numel() for value in exported.values()),
    }


def _new_folder(out: str) -> tuple[Store, str]:
    folder = Store(out)
    folder.check_folder("--out")
    if folder.list():
        raise BadInput(f"--out {out} is not empty", "Name a new folder, or remove what is there")
    return open_file(folder.uri)


def _check_free(store: Store, name: str) -> None:
    if store.exists(name):
        raise BadInput(f"--out: {store.uri}/{name} exists", "Name a new file, or remove this one")


def _read(file: str, what: str) -> bytes:
    store, name = open_file(file)
    try:
        return store.read(name)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        reason = f"there is no {file}" if missing else f"cannot read {file}: {error}"
        raise BadInput(f"{what}: {reason}", "Give a file, local or s3://") from None


def _read_json(file: str) -> dict[str, Any]:
    way_out = "Give --config open_clip's JSON of the model"
    try:
        values = json.loads(_read(file, "--config"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"--config {file} is not JSON: {error}", way_out) from None
    if not isinstance(values, dict):
        raise BadInput(f"--config {file} holds no JSON object", way_out)
    return values


def _model_config(values: Mapping[str, Any], ids: Mapping[str, int]) -> ModelConfig:
    said = {ours: values[theirs] for ours, theirs in _JSON_IDS.items() if values.get(theirs) is not None}
    config = read_config(values, {**said, **ids})
    for name in _JSON_IDS:
        token = getattr(config.text, name)
        if token >= config.text.vocab_size:
            option = f"--{name.replace('_', '-')}"
            raise BadInput(f"{name} = {token} is outside the {config.text.vocab_size} entries", f"Give {option}")
    return config


def _preprocessing(values: Mapping[str, Any], config: ModelConfig, file: str) -> Preprocessing:
    """The JSON's under ``preprocess_cfg``, else that of OpenAI's CLIP, which open_clip takes as well."""
    size, given = config.vision.image_size, values.get("preprocess_cfg") or {}
    if not isinstance(given, Mapping):
        raise BadInput(f"{file}: preprocess_cfg holds no JSON object", "Mend the JSON")
    for key, value in given.items():
        wanted = _PREPROCESSING.get(key, "nothing")
        if value is not None and wanted is not None and value != wanted:
            raise BadInput(f"{file}: preprocess_cfg.{key} = {value!r}, known is {wanted}", "Import a model without it")
    if given.get("size") not in (None, size, [size, size]):
        raise BadInput(f"{file}: preprocess_cfg.size = {given['size']}, the model takes {size}", "Mend one of the two")
    mean, std = given.get("mean") or _CLIP_MEAN, given.get("std") or _CLIP_STD
    try:
        return build_config(Preprocessing, {"image_size": size, "mean": mean, "std": std})
    except BadInput as problem:
        raise BadInput(f"{file}: preprocess_cfg: {problem.cause}", "Give three numbers for each") from None


def _tokenizer(path: Path, config: ModelConfig) -> Tokenizer:
    try:
        with path.open("rb") as stream:
            is_vocabulary = stream.read(2) == _GZIP
    except OSError as error:
        raise BadInput(f"cannot read the tokenizer {path}: {error.strerror}", "Give --tokenizer a file") from None
    tokenizer = clip_tokenizer(path) if is_vocabulary else Tokenizer.load(path)
    way_out = "Give the model's own --tokenizer; ids are set with --pad-id, --begin-id and --end-id"
    check_tokenizer(config, tokenizer, str(path), way_out)
    return tokenizer


def _scale_shape(tensors: Mapping[str, torch.Tensor]) -> torch.Size:
    return next(value.shape for key, value in tensors.items() if key.removeprefix("module.") == "logit_scale")
