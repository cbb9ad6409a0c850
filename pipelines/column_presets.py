"""Which columns of a table of links are meant: named ones, or those of the tables that are published.

| preset   | url, caption       | where the names come from                                                            |
| -------- | ------------------ | ------------------------------------------------------------------------------------ |
| laion    | URL, TEXT          | LAION-400M and LAION-2B: rom1504/img2dataset, dataset_examples/laion400m.md and      |
|          |                    | laion5B.md; the scores of LAION-2B-en-aesthetic and Re-LAION: their dataset cards    |
| datacomp | url, text          | mlfoundations/datacomp, download_upstream.py and README (CommonPool, DataComp-1B)    |
| coyo     | url, text          | kakaobrain/coyo-dataset, README, "Data Fields"                                       |
| cc3m     | 2nd, 1st of 2      | Train_GCC-training.tsv and Validation_GCC-1.1.0-Validation.tsv have no header line:  |
|          |                    | img2dataset, dataset_examples/cc3m.md, adds ``caption``, ``url`` by hand             |
| cc12m    | 1st, 2nd of 2      | cc12m.tsv has none either: dataset_examples/cc12m.md adds ``url``, ``caption``       |
"""

import difflib
from dataclasses import dataclass

from coca.errors import BadInput
from pipelines.links_config import LinksConfig


@dataclass(frozen=True)
class ColumnPreset:
    """The layout of a published table."""

    url: str = "url"
    caption: str = "caption"
    extra: str = ""
    """Names of its other columns, of which each release has some."""
    header: tuple[str, ...] = ()
    """Names of the columns of a .tsv without a header line, whose fields are never quoted."""


PRESETS = {
    "": ColumnPreset(),
    "laion": ColumnPreset(
        "URL",
        "TEXT",
        "SAMPLE_ID WIDTH HEIGHT LICENSE NSFW LANGUAGE similarity hash punsafe pwatermark aesthetic",
    ),
    "datacomp": ColumnPreset(
        "url",
        "text",
        "uid original_width original_height sha256 face_bboxes clip_b32_similarity_score clip_l14_similarity_score",
    ),
    "coyo": ColumnPreset(
        "url",
        "text",
        "id width height image_phash text_length word_count num_tokens_bert num_tokens_gpt num_faces "
        "clip_similarity_vitb32 clip_similarity_vitl14 nsfw_score_opennsfw2 nsfw_score_gantman watermark_score "
        "aesthetic_score_laion_v2",
    ),
    "cc3m": ColumnPreset(header=("caption", "url")),
    "cc12m": ColumnPreset(header=("url", "caption")),
}


@dataclass(frozen=True)
class Columns:
    """What is read of every file of a table."""

    texts: tuple[str, ...]
    """Columns of text, in the order in which they are returned."""
    extra: tuple[str, ...] = ()
    """Columns carried along; with ``*``, all others."""
    optional: tuple[str, ...] = ()
    """Likewise, where a file has them."""
    header: tuple[str, ...] = ()
    """As in ``ColumnPreset``."""
    way_out: str = "name yours with --url-column and --caption-column"

    def extra_of(self, known: list[str], path: str) -> tuple[str, ...]:
        """The columns that a file with the columns ``known`` carries along.

        Raises:
            BadInput: a column is not there; names the nearest.
        """
        for column in (*self.texts, *self.extra):
            if column not in known and (column != "*" or column in self.texts):
                raise self._missing(column, known, path)
        asked = known if "*" in self.extra else [*self.extra, *(name for name in self.optional if name in known)]
        return tuple(dict.fromkeys(name for name in asked if name not in self.texts))

    def _missing(self, column: str, known: list[str], path: str) -> BadInput:
        folded = {name.lower(): name for name in known}
        near = difflib.get_close_matches(column.lower(), folded, n=1, cutoff=0.0)
        hint = f"Did you mean {folded[near[0]]!r}? " if near else ""
        return BadInput(
            f"{path} has no column {column!r}", f"{hint}It has {', '.join(known) or 'none'}; {self.way_out}"
        )


def resolve_columns(config: LinksConfig) -> Columns:
    """The columns that a config means: (url, caption), and those carried along."""
    preset = PRESETS[config.columns]
    return Columns(
        texts=(config.url_column or preset.url, config.caption_column or preset.caption),
        extra=config.extra_columns or (),
        optional=tuple(preset.extra.split()) if config.extra_columns is None else (),
        header=preset.header,
    )
