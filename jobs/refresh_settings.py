"""The settings of a refresh from a preset, a file and flags."""

from collections.abc import Sequence
from pathlib import Path

from coca.dataset import Dataset, list_versions
from coca.storage import Store
from coca.typed_config import lay_over, resolve_config
from pipelines.config import RefreshConfig
from pipelines.presets import preset


def resolve_refresh(
    preset_name: str | None, config_file: Path | None, sets: Sequence[str], dataset: str | None = None
) -> RefreshConfig:
    """Defaults, then the preset, then what the dataset has selected by so far, then ``--config``, then ``--set``.

    Args:
        preset_name: of ``--preset``; by default what the file or a ``--set`` names.
        dataset: of ``--to``; by default what the file or a ``--set`` names.

    Raises:
        BadInput: an unknown preset or key, or a value that is refused.
    """
    named = resolve_config(RefreshConfig(), config_file, sets)
    name, uri = preset_name or named.preset, dataset or named.to
    base = lay_over(RefreshConfig(), preset(name).settings)
    if uri and list_versions(Store(uri)):
        # Rules that `coca data select` has set hold until a refresh names others.
        base = lay_over(base, {"select": Dataset(uri).record.config.get("select", {})})
    return lay_over(resolve_config(base, config_file, sets), {"preset": name})
