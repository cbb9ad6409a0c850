"""The settings of a refresh from a preset, a file and flags."""

from collections.abc import Sequence
from pathlib import Path

from coca.typed_config import lay_over, resolve_config
from pipelines.config import RefreshConfig
from pipelines.presets import preset


def resolve_refresh(preset_name: str | None, config_file: Path | None, sets: Sequence[str]) -> RefreshConfig:
    """Defaults, then the preset, then ``--config``, then ``--set``.

    Args:
        preset_name: of ``--preset``; by default what the file or a ``--set`` names.

    Raises:
        BadInput: an unknown preset or key, or a value that is refused.
    """
    name = preset_name or resolve_config(RefreshConfig(), config_file, sets).preset
    resolved = resolve_config(lay_over(RefreshConfig(), preset(name).settings), config_file, sets)
    return lay_over(resolved, {"preset": name})
