"""Whether a run can go on: what it must share with the run it continues."""

from typing import Any

from coca.errors import BadInput
from coca.mixture import Mixture
from coca.run_folder import RunFolder
from coca.tokenizer import Tokenizer
from coca.train_config import TrainConfig
from coca.typed_config import flatten

_CHANGEABLE: dict[str, Any] = {
    "log_every": True,
    "checkpoint_every": True,
    "keep_checkpoints": True,
    "keep_best": True,
    "evaluate_every": True,
    "activation_checkpointing": True,
    "compile": True,
    "parallel": True,
    "optimizer": {"max_skipped_steps"},
}
"""What changes no number, or numbers by the order of sums only."""


def fit_to_tokenizer(config: TrainConfig, tokenizer: Tokenizer) -> TrainConfig:
    """The config with the vocabulary size and special ids of the datasets' tokenizer, which decides them."""
    ids = {"pad_id": tokenizer.pad_id, "begin_id": tokenizer.begin_id, "end_id": tokenizer.end_id}
    text = config.model.text.model_copy(update={"vocab_size": tokenizer.vocab_size, **ids})
    return config.model_copy(update={"model": config.model.model_copy(update={"text": text})})


def fixed_fields(config: TrainConfig, mixture: Mixture) -> dict[str, Any]:
    """What a resumed run must share with the run it continues, flat: everything that decides its numbers."""
    return flatten(config.model_dump(mode="json", exclude=_CHANGEABLE)) | mixture.identity()


def check_same_run(saved: dict[str, Any] | None, wanted: dict[str, Any], run: RunFolder) -> None:
    """Raises BadInput, naming what differs, unless a run can go on under ``wanted``; None is a run yet to begin."""
    if saved is None:
        return
    differing = [name for name in sorted(saved.keys() | wanted.keys()) if saved.get(name) != wanted.get(name)]
    if not differing:
        return
    own_dataset = "Give the dataset it was started with, or another --out for a new run"
    if "data.tokenizer" in differing:
        raise BadInput(
            f"{run.uri} was started on tokens of the tokenizer {saved.get('data.tokenizer')}, this dataset was written"
            f" by {wanted['data.tokenizer']}",
            own_dataset,
        )
    version = next((name for name in differing if name.startswith("data.") and name.endswith(".version")), None)
    if version is None and any(name.endswith(".row_groups") for name in differing):
        raise BadInput(f"{run.uri} was started on another dataset", own_dataset)
    name = version or differing[0]
    raise BadInput(
        f"{run.uri} was started with {name} = {saved.get(name)!r}, now it is {wanted.get(name)!r}",
        "Give the old value to go on, or another --out for a new run",
    )
