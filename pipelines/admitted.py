"""What a dataset has admitted: selection may ask for more than that, never for less."""

from collections.abc import Mapping
from typing import Any

from coca.contract import VersionRecord
from coca.errors import BadInput
from pipelines.select_config import SelectConfig

# Rule of selection -> where the config of a refresh has the rule of admission.
_ADMISSION = {
    "min_words": ("judge", "min_words"),
    "max_words": ("judge", "max_words"),
    "min_chars": ("judge", "min_chars"),
    "max_chars": ("judge", "max_chars"),
    "max_caption_count": ("judge", "max_caption_count"),
    "min_side": ("image", "limits", "min_side"),
    "max_aspect_ratio": ("image", "limits", "max_aspect_ratio"),
}


def check_loosening(record: VersionRecord, config: SelectConfig) -> None:
    """Hold a selection against the rules under which the latest refresh admitted pairs.

    Raises:
        BadInput: a rule asks for less than was admitted: what it lets through was never stored.
    """
    for name, place in _ADMISSION.items():
        wanted, admitted = getattr(config, name), _look_up(record.config, place)
        if wanted is None or admitted is None:
            continue
        if wanted < admitted if name.startswith("min_") else wanted > admitted:
            raise _refusal(record, f"select.{name} = {wanted:g}", f"{'.'.join(place)} = {admitted:g}", ".".join(place))
    languages = _look_up(record.config, ("judge", "languages"))
    beyond = sorted(set(config.languages or ()) - set(languages)) if languages else []
    if beyond:
        raise _refusal(
            record,
            f"select.languages holds {', '.join(beyond)}",
            f"judge.languages = {', '.join(languages)}",
            "judge.languages",
        )


def _refusal(record: VersionRecord, wanted: str, admitted: str, rule: str) -> BadInput:
    return BadInput(
        f"{wanted} is looser than what version {record.version} admitted: {admitted}; "
        "the pairs between the two were refused before they were stored",
        f"Refresh the dataset from its links with a looser {rule}, which fetches them, and select then",
    )


def _look_up(config: Mapping[str, Any], place: tuple[str, ...]) -> Any:
    value: Any = config
    for key in place:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
