"""Plain checkpoints: safetensors and JSON, no pickle, a manifest with sizes and SHA-256 written last.

| file                  | holds                                                         | needed to |
| --------------------- | ------------------------------------------------------------- | --------- |
| model.safetensors     | the weights                                                   | use       |
| config.json           | the architecture, where the weights come from, the step       | use       |
| tokenizer.json        | the tokenizer                                                 | use       |
| preprocessing.json    | image size, mean and std                                      | use       |
| optimizer.safetensors | optimizer state and the random state of torch                 | resume    |
| resume.json           | position in the data, and the config the run cannot change    | resume    |
| manifest.json         | size and SHA-256 of each file above; without it there is none | trust     |
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from coca.config import ModelConfig, Preprocessing
from coca.errors import BadInput
from coca.model import CoCa
from coca.storage import Store
from coca.tokenizer import Tokenizer
from coca.typed_config import build_config

MANIFEST = "manifest.json"


@dataclass
class Checkpoint:
    """A model ready to use, with everything that must travel with its weights."""

    model: CoCa
    tokenizer: Tokenizer
    preprocessing: Preprocessing
    config: ModelConfig
    step: int
    provenance: dict[str, Any]
    digest: str  # of the manifest, hence of every file


@dataclass
class ResumeState:
    """What a run needs beside the weights to go on."""

    optimizer: dict[str, Tensor]
    position: int  # global batches consumed
    fixed: dict[str, Any]  # config fields that a resumed run must share


def save_checkpoint(
    store: Store,
    path: str,
    *,
    model: CoCa,
    tokenizer: Tokenizer,
    preprocessing: Preprocessing,
    step: int,
    provenance: dict[str, Any],
    resume: ResumeState | None = None,
) -> None:
    """Write a checkpoint folder ``path`` of ``store``; it counts only once its manifest, the last file, is there."""
    files = {
        "model.safetensors": safetensors.torch.save(_contiguous(model.state_dict())),
        "config.json": _json({"model": model.config.model_dump(), "step": step, "provenance": provenance}),
        "tokenizer.json": tokenizer.to_json().encode(),
        "preprocessing.json": _json(preprocessing.model_dump()),
    }
    if resume is not None:
        tensors = {**resume.optimizer, "rng/torch": torch.get_rng_state()}
        files["optimizer.safetensors"] = safetensors.torch.save(_contiguous(tensors))
        files["resume.json"] = _json({"position": resume.position, "fixed": resume.fixed})
    store.delete(path)
    for name, data in files.items():
        store.write(f"{path}/{name}", data)
    entries = {name: {"bytes": len(data), "sha256": _sha256(data)} for name, data in files.items()}
    store.write(f"{path}/{MANIFEST}", _json({"files": entries}))


def load_checkpoint(uri: str) -> Checkpoint:
    """A checkpoint by its uri; a run folder gives its newest one. The model is float32, in eval mode.

    Raises:
        BadInput: nothing there, a file missing or changed since the manifest was written, or weights that do not fit.
    """
    store = Store(uri)
    if not store.exists(MANIFEST) and store.exists("checkpoints"):
        steps = list_checkpoints(store)
        if steps:
            store = store.child(checkpoint_path(steps[-1]))
    files, digest = _read_verified(store, ("model.safetensors", "config.json", "tokenizer.json", "preprocessing.json"))
    values = _parse(files["config.json"], store, "config.json")
    config = build_config(ModelConfig, values.get("model", {}))
    model = CoCa(config)
    _load_weights(model, _tensors(files["model.safetensors"], store, "model.safetensors"), store.uri)
    tokenizer = Tokenizer.from_json(files["tokenizer.json"].decode(), source=f"{store.uri}/tokenizer.json")
    if tokenizer.vocab_size > config.text.vocab_size:
        raise BadInput(
            f"{store.uri}: the tokenizer has {tokenizer.vocab_size} entries, the model {config.text.vocab_size}",
            "Tokenizer and weights do not belong together: restore the checkpoint",
        )
    preprocessing = build_config(Preprocessing, _parse(files["preprocessing.json"], store, "preprocessing.json"))
    provenance = values.get("provenance", {})
    return Checkpoint(model.eval(), tokenizer, preprocessing, config, int(values.get("step", 0)), provenance, digest)


def load_model(uri: str) -> CoCa:
    """The model of a checkpoint, float32, in eval mode."""
    return load_checkpoint(uri).model


def load_resume(store: Store, path: str, model: CoCa) -> ResumeState:
    """Load weights into ``model`` and give back the rest of a run's state; torch's random state is restored.

    Raises:
        BadInput: the checkpoint is damaged or holds no resume state.
    """
    files, _ = _read_verified(store.child(path), ("model.safetensors", "optimizer.safetensors", "resume.json"))
    _load_weights(model, _tensors(files["model.safetensors"], store, "model.safetensors"), f"{store.uri}/{path}")
    optimizer = _tensors(files["optimizer.safetensors"], store, "optimizer.safetensors")
    torch.set_rng_state(optimizer.pop("rng/torch"))
    values = _parse(files["resume.json"], store, "resume.json")
    return ResumeState(optimizer, values["position"], values["fixed"])


def checkpoint_path(step: int) -> str:
    return f"checkpoints/step_{step:09d}"


def list_checkpoints(run: Store) -> list[int]:
    """Steps of the whole checkpoints of a run folder, ascending: those with a manifest."""
    names = (name for name in run.list("checkpoints") if name.startswith("step_"))
    return sorted(int(n.removeprefix("step_")) for n in names if run.exists(f"checkpoints/{n}/{MANIFEST}"))


def _read_verified(store: Store, names: tuple[str, ...]) -> tuple[dict[str, bytes], str]:
    try:
        manifest = store.read(MANIFEST)
    except FileNotFoundError:
        raise BadInput(
            f"{store.uri} is not a checkpoint: it holds no {MANIFEST}",
            "Name a folder that `coca train` wrote",
        ) from None
    entries = _parse(manifest, store, MANIFEST).get("files", {})
    files = {}
    for name in names:
        if name not in entries:
            raise BadInput(f"{store.uri} lists no {name}", "It cannot be used for this: name another checkpoint")
        try:
            data = store.read(name)
        except FileNotFoundError:
            raise BadInput(f"{store.uri}/{name} is missing", "The checkpoint is damaged: use another") from None
        if len(data) != entries[name]["bytes"] or _sha256(data) != entries[name]["sha256"]:
            raise BadInput(
                f"{store.uri}/{name} does not match its SHA-256 in the manifest",
                "The checkpoint is damaged: use another",
            )
        files[name] = data
    return files, _sha256(manifest)[:16]


def _load_weights(model: CoCa, tensors: dict[str, Tensor], source: str) -> None:
    expected = model.state_dict()
    problems = [f"{key} is missing" for key in expected if key not in tensors]
    problems += [f"{key} is unknown" for key in tensors if key not in expected]
    problems += [
        f"{key} has shape {tuple(tensors[key].shape)}, not {tuple(value.shape)}"
        for key, value in expected.items()
        if key in tensors and tensors[key].shape != value.shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise BadInput(f"{source} does not fit its config: {'; '.join(problems[:3])}{more}", "Use another checkpoint")
    model.load_state_dict(tensors)


def _tensors(data: bytes, store: Store, name: str) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise BadInput(f"{store.uri}/{name} is not a safetensors file: {error}", "Use another checkpoint") from None


def _parse(data: bytes, store: Store, name: str) -> dict[str, Any]:
    try:
        values = json.loads(data)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{store.uri}/{name} is not JSON: {error}", "The checkpoint is damaged: use another") from None
    if not isinstance(values, dict):
        raise BadInput(f"{store.uri}/{name} holds no JSON object", "The checkpoint is damaged: use another")
    return values


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().cpu().contiguous() for key, value in tensors.items()}


def _json(values: dict[str, Any]) -> bytes:
    return json.dumps(values, indent=1).encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
