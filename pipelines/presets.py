"""Presets: the rules of published image-text datasets as settings, each number with its source.

A preset is a layer of defaults for the sections ``judge``, ``image`` and ``select`` of a refresh; whatever a config
file or ``--set`` says stands above it. Rules that need a model or a list that is not there are ``unapplied``.
``docs/presets.md`` holds the same as tables.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from coca.errors import BadInput

# Stands for "no bound" where a source has none: our own guard against texts and pictures of absurd shape.
_OPEN = 65_536

_NO_RULE = "no such rule in the source; 65,536 is a guard of our own"
_ANY_TEXT = "no such rule in the source; captions that are empty are refused everywhere"


class Unapplied(NamedTuple):
    """A rule of the source that the preset does not apply."""

    rule: str
    needs: str
    setting: str | None = None
    """The setting that would apply it, once its user has what it needs."""


@dataclass(frozen=True)
class Preset:
    """Settings of a published dataset."""

    name: str
    settings: dict[str, Any]
    """Nested, for the sections judge, image and select."""
    citations: dict[str, str]
    """Where each value comes from, by its dotted name."""
    unapplied: tuple[Unapplied, ...] = ()

    def unapplied_rules(self, config: Mapping[str, Any]) -> list[str]:
        """The rules that stay unapplied under a resolved config (as plain values): those whose setting is empty."""
        return [
            f"{self.name}: {each.rule} (needs {each.needs})"
            for each in self.unapplied
            if each.setting is None or not _value(config, each.setting)
        ]


def preset(name: str) -> Preset:
    """
    Raises:
        BadInput: there is none of that name.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name.lower(), PRESETS, n=1, cutoff=0.0)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise BadInput(f"there is no preset {name!r}", f"{hint}There are {', '.join(PRESETS)}")
    return PRESETS[name]


def _value(config: Mapping[str, Any], dotted: str) -> Any:
    value: Any = config
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _make(name: str, values: dict[str, tuple[Any, str]], unapplied: tuple[Unapplied, ...] = ()) -> Preset:
    settings: dict[str, Any] = {}
    for dotted, (value, _) in values.items():
        *sections, field = dotted.split(".")
        place = settings
        for section in sections:
            place = place.setdefault(section, {})
        place[field] = value
    return Preset(name, settings, {dotted: source for dotted, (_, source) in values.items()}, unapplied)


_ALIGN = "Jia et al. 2021 (arXiv:2102.05918), section 3"
_COYO = "COYO-700M, README of kakaobrain/coyo-dataset, Data Filtering"
_LAION = "Schuhmann et al. 2021 (arXiv:2111.02114), section 2.1.1"
_LAION_WORKER = "worker.py of rvencu/crawlingathome-gpu-hcloud, commit 0042fd12, which collected LAION-400M"
_CC3M = "Sharma et al. 2018 (ACL, P18-1238), section 3"
_CC12M = "Changpinyo et al. 2021 (arXiv:2102.08981), as quoted in the dataset card of conceptual_12m"
_DATACOMP = "baselines/apply_filter.py of mlfoundations/datacomp, load_uids_with_basic_filter_helper, commit 274dbeea"
_LANGID = "py3langid stands in for the source's identifier"

_align = _make(
    "align",
    {
        "judge.min_words": (3, f"{_ALIGN}: 'too short (<3 unigrams)' is discarded; we count words between whitespace"),
        "judge.max_words": (20, f"{_ALIGN}: 'too long (>20 unigrams)' is discarded"),
        "judge.min_chars": (1, _ANY_TEXT),
        "judge.max_chars": (_OPEN, _NO_RULE),
        "judge.max_caption_count": (
            10,
            f"{_ALIGN}: 'exclude alt-texts that are shared by more than 10 images'; we count links, not pictures",
        ),
        "image.limits.min_side": (201, f"{_ALIGN}: 'shorter dimension is larger than 200 pixels', so 200 is refused"),
        "image.limits.max_aspect_ratio": (
            math.nextafter(3.0, 0.0),
            f"{_ALIGN}: 'aspect ratio is smaller than 3'; the limit is inclusive, so it is the largest float below 3",
        ),
        "select.max_captions_per_image": (
            1000,
            f"{_ALIGN}: 'Images with more than 1000 associated alt-texts are discarded'",
        ),
        "select.duplicates": ("none", f"{_ALIGN} drops no picture for being there twice"),
    },
    (
        Unapplied("no pornographic images", "an image classifier"),
        Unapplied(
            "no near-duplicates of test images (ILSVRC-2012, Flickr30K, MSCOCO)",
            "hashes of those images",
            "select.contaminants",
        ),
        Unapplied("no token outside the 100 million most frequent unigrams and bigrams", "that table of tokens"),
    ),
)

_coyo = _make(
    "coyo",
    {
        "judge.min_words": (3, f"{_COYO}: 'less than 3 words' is dropped"),
        "judge.max_words": (
            256,
            f"{_COYO}: 'more than 256 words' is dropped (yet its table of statistics gives a largest count of 323)",
        ),
        "judge.min_chars": (6, f"{_COYO}: 'a length of 5 or less' is dropped"),
        "judge.max_chars": (
            1000,
            f"{_COYO}: 'texts over 1000 in length' (an older version says 1000 words); largest in its statistics: 1000",
        ),
        "judge.max_caption_count": (10, f"{_COYO}: 'texts appearing more than 10 times' are dropped"),
        "judge.languages": (["en"], f"{_COYO}: only English, by CLD3; {_LANGID}"),
        "judge.min_language_confidence": (0.0, f"{_COYO} names no threshold"),
        "image.limits.min_bytes": (
            5000,
            f"{_COYO}: 'less than 5KB' is dropped; whether that is 5000 or 5120 bytes is not verified",
        ),
        "image.limits.min_side": (200, f"{_COYO}: 'min(width, height) < 200' is dropped"),
        "image.limits.max_aspect_ratio": (3.0, f"{_COYO}: 'aspect ratio greater than 3.0' is dropped"),
        "select.pair_duplicates_by_phash": (
            True,
            f"{_COYO}: 'Based on (image_phash, text), duplicated samples have been dropped'",
        ),
        "select.duplicates": ("none", f"{_COYO}: one picture may have several texts"),
    },
    (
        Unapplied("no text without a noun", "a part-of-speech tagger"),
        Unapplied(
            "no text with a word of profanity_filter, better_profanity or google_twunter_lol",
            "those word lists",
            "judge.blocked_words",
        ),
        Unapplied("OpenNSFW2 and GantMan/NSFW scores of at most 0.5", "those models"),
        Unapplied(
            "no picture of ImageNet-1K/21K, Flickr30K, MS-COCO, CC3M, CC12M by pHash",
            "their hashes",
            "select.contaminants",
        ),
        Unapplied("every format that Pillow decodes", "decoders that we do not let strangers reach (BMP, TIFF, ...)"),
        Unapplied("language by CLD3", "CLD3 (py3langid is used)"),
    ),
)

_laion400m = _make(
    "laion400m",
    {
        "judge.min_words": (1, _ANY_TEXT),
        "judge.max_words": (_OPEN, _NO_RULE),
        "judge.min_chars": (5, f"{_LAION}: 'less than 5 character alt-text length' is dropped"),
        "judge.max_chars": (_OPEN, _NO_RULE),
        "judge.languages": (["en"], f"{_LAION_WORKER}: cld2.detect(...) == 'en'; {_LANGID}"),
        "judge.min_language_confidence": (0.0, f"{_LAION_WORKER}: the first language CLD2 returns, no threshold"),
        "judge.block_url_parts": (
            [".svg", ".gif", "data:image", "javascript:"],
            f"{_LAION_WORKER}: links that contain one of these are passed over",
        ),
        "image.limits.min_bytes": (5000, f"{_LAION}: 'less than 5 KB image size'; {_LAION_WORKER}: len(...) < 5000"),
        "image.limits.min_side": (1, "no such rule in the source"),
        "image.limits.max_aspect_ratio": (float(_OPEN), _NO_RULE),
        "image.limits.formats": (["jpeg", "png", "webp"], f"{_LAION_WORKER}: 'JPEG', 'JPG', 'PNG', 'WEBP'"),
        "select.duplicates": ("none", f"{_LAION}: duplicates go by url and alt-text, which every refresh does"),
    },
    (
        Unapplied("CLIP ViT-B/32 similarity of at least 0.3", "a CLIP scorer"),
        Unapplied("illegal contents dropped by CLIP embeddings", "a CLIP scorer and reference embeddings"),
        Unapplied("no link of a domain that failed before", "LAION's list", "judge.block_domains"),
        Unapplied("language by CLD2", "CLD2 (py3langid is used)"),
    ),
)

_cc12m = _make(
    "cc12m",
    {
        "judge.min_words": (3, f"{_CC12M}: 'between 3 and 256 words'; we count words between whitespace"),
        "judge.max_words": (256, f"{_CC12M}: 'between 3 and 256 words'"),
        "judge.min_chars": (1, _ANY_TEXT),
        "judge.max_chars": (_OPEN, _NO_RULE),
        "judge.max_word_repetition": (
            0.2,
            f"{_CC12M}: 'maximum fraction of word repetition allowed to 0.2'; no source defines the fraction, we take "
            "the share of words that occur before",
        ),
        "image.limits.min_side": (
            401,
            f"{_CC12M}: 'size greater than 400 pixels'; {_CC3M}: 'both dimensions are greater than 400 pixels'",
        ),
        "image.limits.max_aspect_ratio": (
            2.5,
            f"{_CC12M}: 'maximum ratio of larger to smaller dimension to 2.5 instead of 2'; {_CC3M}: 'no more than 2'",
        ),
        "image.limits.formats": (["jpeg"], f"{_CC12M}: 'only JPEG images'"),
        "select.duplicates": ("none", f"{_CC12M} drops no picture for being there twice"),
    },
    (
        Unapplied("no pornographic images", "an image classifier"),
        Unapplied("no text without a noun or without a determiner", "a part-of-speech tagger"),
        Unapplied("no word type rarer than 20 in the English Wikipedia", "that table of words"),
        Unapplied("no text that scores as very positive, very negative or profane", "a sentiment and profanity model"),
        Unapplied("some word names what an image classifier sees", "an image classifier with text labels"),
        Unapplied("names of persons replaced by a token", "a recogniser of names"),
        Unapplied("boilerplate prefixes and suffixes cropped", "Google's list of them"),
    ),
)

_datacomp_basic = _make(
    "datacomp-basic",
    {
        "judge.min_words": (3, f"{_DATACOMP}: len(x.split()) > 2"),
        "judge.max_words": (_OPEN, _NO_RULE),
        "judge.min_chars": (6, f"{_DATACOMP}: len(x) > 5"),
        "judge.max_chars": (_OPEN, _NO_RULE),
        "judge.languages": (["en"], f"{_DATACOMP}: fastText lid.176 says 'en'; {_LANGID}"),
        "judge.min_language_confidence": (0.0, f"{_DATACOMP}: the likeliest label, no threshold"),
        "image.limits.min_side": (
            200,
            f"{_DATACOMP}: min_image_dim >= 200 (the paper, arXiv:2304.14108, section 4.1, says 'above 200')",
        ),
        "image.limits.max_aspect_ratio": (3.0, f"{_DATACOMP}: aspect_ratio <= 3.0 (the paper says 'below three')"),
        "select.duplicates": ("none", f"{_DATACOMP} does not look for duplicates"),
    },
    (
        Unapplied("language by fastText lid.176", "fastText and its model (py3langid is used)"),
        Unapplied("no near-duplicates of evaluation images (of the pool)", "their hashes", "select.contaminants"),
        Unapplied("no unsafe texts and images (of the pool)", "Detoxify and an image classifier"),
        Unapplied("faces blurred (of the pool)", "a face detector"),
    ),
)

# No published rules: the defaults of the configs stand.
_none = _make("none", {})

PRESETS = {each.name: each for each in (_align, _coyo, _laion400m, _cc12m, _datacomp_basic, _none)}
