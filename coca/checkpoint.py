"""Plain checkpoints: safetensors and JSON, no pickle, a manifest with sizes and SHA-256 written last.

| file               | holds                                                               | needed to |
| ------------------ | ------------------------------------------------------------------- | --------- |
| model.safetensors  | the weights                                                         | use       |
| config.json        | the architecture, where the weights come from, the step             | use       |
| tokenizer.json     | the tokenizer; imported weights may lack it                         | use       |
| preprocessing.json | image size, mean and std                                            | use       |
| resume.json        | position in the data, the config the run cannot change, counters    | resume    |
| state/             | weights, optimizer, averages, random state (`coca.sharded_state`)   | resume    |
| manifest.json      | size and SHA-256 of each file above; without it there is none       | trust     |

What a run needs to resume is written by `coca.checkpoint_saver` and read by `coca.restore`; imports lack it.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import safetensors.torch
import torch
from pydantic import Field
from safetensors import SafetensorError
from torch import Tensor

from coca.config import ModelConfig, Preprocessing
from coca.errors import BadInput
from coca.manifest import DAMAGED, MANIFEST, file_entry, read_json, read_listed, read_manifest, write_manifest
from coca.model import CoCa
from coca.storage import Store
from coca.tokenizer import Tokenizer
from coca.typed_config import C, Config, build_config

_FOLDER = re.compile(r"step_(\d{9,})")
Count = Annotated[int, Field(ge=0)]


class ModelFile(Config):
    """config.json."""

    model: ModelConfig
    """The architecture."""
    step: Count
    """Optimizer steps that made the weights."""
    provenance: dict[str, Any]
    """Dataset, its version, code version, seed."""


@dataclass
class Checkpoint:
    """A model ready to use, with everything that must travel with its weights."""

    model: CoCa
    own_tokenizer: Tokenizer | None  # imported weights may have come without one
    preprocessing: Preprocessing
    config: ModelConfig
    step: int
    provenance: dict[str, Any]
    digest: str  # of the manifest, hence of every file
    uri: str  # of the checkpoint's own folder, also where a run folder was named

    @property
    def tokenizer(self) -> Tokenizer:
        """
        Raises:
            BadInput: the checkpoint holds none.
        """
        if self.own_tokenizer is None:
            raise BadInput(f"{self.uri} holds no tokenizer", "Import its weights again with --tokenizer FILE")
        return self.own_tokenizer


@dataclass(frozen=True)
class PlainParts:
    """What a plain checkpoint is written from."""

    weights: dict[str, Tensor]
    """Of the whole model, for use: the averaged ones where a run keeps them."""
    config: ModelConfig
    tokenizer: Tokenizer | None
    preprocessing: Preprocessing
    provenance: dict[str, Any]
    """Dataset, its version, code version, seed."""
    step: int
    """Optimizer steps that made the weights."""

    def files(self) -> Iterator[tuple[str, bytes]]:
        """Each file's name and bytes, one after the other."""
        yield "model.safetensors", safetensors.torch.save(_contiguous(self.weights))
        yield "config.json", _json(ModelFile(model=self.config, step=self.step, provenance=self.provenance))
        yield "preprocessing.json", _json(self.preprocessing)
        if self.tokenizer is not None:
            yield "tokenizer.json", self.tokenizer.to_json().encode()


def save_checkpoint(
    store: Store,
    path: str,
    *,
    model: CoCa,
    tokenizer: Tokenizer | None,
    preprocessing: Preprocessing,
    step: int,
    provenance: dict[str, Any],
) -> None:
    """Write a checkpoint folder ``path`` of ``store``; it counts only once its manifest, the last file, is there."""
    parts = PlainParts(model.state_dict(), model.config, tokenizer, preprocessing, provenance, step)
    entries = {}
    store.delete(path)
    for name, data in parts.files():
        store.write(f"{path}/{name}", data)
        entries[name] = file_entry(data)
    write_manifest(store, path, entries)


def load_checkpoint(uri: str) -> Checkpoint:
    """A checkpoint by its uri; a run folder gives its newest one. The model is float32, in eval mode.

    Raises:
        BadInput: nothing there, a file missing or changed since the manifest was written, or parts that do not fit.
    """
    store = _newest(Store(uri))
    needed = ("model.safetensors", "config.json", "preprocessing.json")
    files, digest = _read_verified(store, needed, optional=("tokenizer.json",))
    described = _parse(ModelFile, files["config.json"], store, "config.json")
    preprocessing = _parse(Preprocessing, files["preprocessing.json"], store, "preprocessing.json")
    tokenizer = _tokenizer(files["tokenizer.json"], store) if "tokenizer.json" in files else None
    _check_parts(described.model, tokenizer, preprocessing, store)
    tensors = _tensors(files["model.safetensors"], store, "model.safetensors")
    # Held against the shapes alone first: a config that asks for more than there is takes no memory.
    with torch.device("meta"):
        model = CoCa(described.model)
    _check_weights(model, tensors, store.uri)
    model.load_state_dict({key: value.float() for key, value in tensors.items()}, assign=True)
    return Checkpoint(
        model=model.eval(),
        own_tokenizer=tokenizer,
        preprocessing=preprocessing,
        config=described.model,
        step=described.step,
        provenance=described.provenance,
        digest=digest,
        uri=store.uri,
    )


def load_tensors(uri: str) -> tuple[dict[str, Tensor], ModelFile]:
    """The weights of a checkpoint as they are stored, and its description; a run folder gives its newest one.

    Raises:
        BadInput: as for ``load_checkpoint``.
    """
    store = _newest(Store(uri))
    files, _ = _read_verified(store, ("model.safetensors", "config.json"))
    described = _parse(ModelFile, files["config.json"], store, "config.json")
    tensors = _tensors(files["model.safetensors"], store, "model.safetensors")
    with torch.device("meta"):
        _check_weights(CoCa(described.model), tensors, store.uri)
    return tensors, described


def read_description(uri: str) -> ModelFile:
    """What config.json of a checkpoint says, without its weights; a run folder gives its newest one.

    Raises:
        BadInput: nothing there, or the file is missing or changed since the manifest was written.
    """
    store = _newest(Store(uri))
    return _parse(ModelFile, _read_verified(store, ("config.json",))[0]["config.json"], store, "config.json")


def check_tokenizer(config: ModelConfig, tokenizer: Tokenizer, source: str, way_out: str) -> None:
    """Raises BadInput unless a model can read the tokenizer's ids."""
    if tokenizer.vocab_size > config.text.vocab_size:
        entries = f"the tokenizer has {tokenizer.vocab_size} entries, the model {config.text.vocab_size}"
        raise BadInput(f"{source}: {entries}", way_out)
    for name in ("pad_id", "begin_id", "end_id"):
        ours, wanted = getattr(tokenizer, name), getattr(config.text, name)
        if ours != wanted:
            raise BadInput(f"{source}: {name} is {ours} in the tokenizer, {wanted} in the model", way_out)


def load_model(uri: str) -> CoCa:
    """The model of a checkpoint, float32, in eval mode."""
    return load_checkpoint(uri).model


def checkpoint_path(step: int) -> str:
    """Where a run folder keeps the checkpoint of a step."""
    return f"checkpoints/step_{step:09d}"


def checkpoint_step(name: str) -> int | None:
    """The step of a checkpoint folder's name; None for a folder that is none of ours."""
    match = _FOLDER.fullmatch(name)
    return int(match[1]) if match else None


def list_checkpoints(run: Store) -> list[int]:
    """Steps of the whole checkpoints of a run folder, ascending: those with a manifest."""
    steps = (checkpoint_step(name) for name in run.list("checkpoints"))
    return sorted(step for step in steps if step is not None and run.exists(f"{checkpoint_path(step)}/{MANIFEST}"))


def _newest(store: Store) -> Store:
    """A run folder's newest checkpoint; any other folder as it is."""
    if store.exists(MANIFEST):
        return store
    steps = list_checkpoints(store)
    if steps:
        return store.child(checkpoint_path(steps[-1]))
    if store.exists("config.yaml"):
        raise BadInput(f"the run {store.uri} has no whole checkpoint yet", "Start its `coca train` again and wait")
    return store


def _read_verified(
    store: Store, names: tuple[str, ...], optional: tuple[str, ...] = ()
) -> tuple[dict[str, bytes], str]:
    entries, manifest = read_manifest(store)
    wanted = (*names, *(name for name in optional if name in entries))
    files = {name: read_listed(store, name, entries) for name in wanted}
    return files, file_entry(manifest)["sha256"][:16]


def _tokenizer(data: bytes, store: Store) -> Tokenizer:
    source = f"{store.uri}/tokenizer.json"
    try:
        return Tokenizer.from_json(data.decode(), source=source)
    except UnicodeDecodeError as error:
        raise BadInput(f"{source} is not text: {error}", DAMAGED) from None


def _check_parts(config: ModelConfig, tokenizer: Tokenizer | None, preprocessing: Preprocessing, store: Store) -> None:
    """Each part may be whole and yet belong to another model."""
    way_out = "The files do not belong together: restore the checkpoint"
    if tokenizer is not None:
        check_tokenizer(config, tokenizer, store.uri, way_out)
    if preprocessing.image_size != config.vision.image_size:
        sizes = f"preprocessing gives {preprocessing.image_size} pixels, the model takes {config.vision.image_size}"
        raise BadInput(f"{store.uri}: {sizes}", way_out)


def _check_weights(model: CoCa, tensors: dict[str, Tensor], source: str) -> None:
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


def _tensors(data: bytes, store: Store, name: str) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise BadInput(f"{store.uri}/{name} is not a safetensors file: {error}", DAMAGED) from None


def _parse(kind: type[C], data: bytes, store: Store, name: str) -> C:
    try:
        return build_config(kind, read_json(data, store, name))
    except BadInput as problem:
        raise BadInput(f"{store.uri}/{name}: {problem.cause}", DAMAGED) from None


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().cpu().contiguous() for key, value in tensors.items()}


def _json(values: Config) -> bytes:
    return json.dumps(values.model_dump(mode="json"), indent=1).encode()
