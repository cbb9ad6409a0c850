"""Presets: their border cases, written by hand from the cited rules, and that every number is cited."""

import csv
import itertools
import math
import re
import struct
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from coca.contract import Reason
from coca.errors import BadInput
from coca.images import ImageLimits, ImageProblem, probe
from coca.typed_config import build_config, resolve_config
from pipelines.image_config import ImageConfig
from pipelines.judge import judge_pairs, load_rules
from pipelines.judge_config import JudgeConfig
from pipelines.presets import PRESETS, Preset, preset
from pipelines.select_config import SelectConfig

TABLES = Path(__file__).parents[1] / "data" / "presets"
SECTIONS = {"judge": JudgeConfig, "image": ImageConfig, "select": SelectConfig}


def resolve(name: str) -> tuple[JudgeConfig, ImageConfig, SelectConfig]:
    configs = []
    for section, kind in SECTIONS.items():
        values = kind().model_dump()
        merge(values, preset(name).settings.get(section, {}))
        configs.append(build_config(kind, values))
    return tuple(configs)  # type: ignore[return-value]


def merge(into: dict[str, Any], values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            merge(into[key], value)
        else:
            into[key] = value


def cases(name: str) -> list[dict[str, str]]:
    with (TABLES / f"{name}.csv").open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines, strict=True))
    assert all(None not in row and None not in row.values() for row in rows), "a row has too many or too few cells"
    return rows


ENGLISH = "The old house by the lake stands in front of a small wooden church with a white door and two windows. "
SHORT_WORDS = {2: "of to in it is on by at an we", 4: "with that this from have they were when some into"}


def written(cell: str) -> str:
    """A cell as text: ``<N words>``, ``<N words of M chars>``, ``<N chars>``, ``<empty>``, and backslash escapes."""
    if cell == "<empty>":
        return ""
    if match := re.fullmatch(r"<(\d+) chars>", cell):
        text = (ENGLISH * (int(match[1]) // len(ENGLISH) + 1))[: int(match[1])]
        return text[:-1] + "x" if text.endswith(" ") else text
    if match := re.fullmatch(r"<(\d+) words of (\d+) chars>", cell):
        count, chars = int(match[1]), int(match[2])
        some = SHORT_WORDS[chars].split() if chars in SHORT_WORDS else [str(n).ljust(chars, "x") for n in range(count)]
        return " ".join(itertools.islice(itertools.cycle(some), count))
    if match := re.fullmatch(r"<(\d+) words>", cell):
        different = dict.fromkeys(ENGLISH.lower().rstrip(". ").split())
        return " ".join(itertools.islice([*different, *(f"house{number}" for number in range(300))], int(match[1])))
    return cell.encode("latin-1", "backslashreplace").decode("unicode_escape") if "\\" in cell else cell


def body(kind: str, width: int, height: int, size: int) -> bytes:
    """The header of a picture, filled up to ``size`` bytes."""
    headers = {
        "jpeg": b"\xff\xd8\xff\xc0\x00\x11\x08" + struct.pack(">HH", height, width),
        "png": b"\x89PNG\r\n\x1a\n\x00\x00\x00\x0dIHDR" + struct.pack(">II", width, height),
        "gif": b"GIF89a" + struct.pack("<HH", width, height),
        "webp": b"RIFF\0\0\0\0WEBPVP8 \0\0\0\0\0\0\0\x9d\x01\x2a" + struct.pack("<HH", width, height),
        "bmp": b"BM" + struct.pack("<IIIIii", size, 0, 54, 40, width, height),
    }
    return headers[kind].ljust(size, b"\0")


def judge_picture(case: dict[str, str], limits: ImageLimits) -> str | None:
    width, height = int(case["width"] or 800), int(case["height"] or 600)
    try:
        probe(body(case["format"] or "jpeg", width, height, int(case["bytes"] or 60_000)), limits)
    except ImageProblem as problem:
        return problem.reason.value
    return None


def select(case: dict[str, str], config: SelectConfig) -> str | None:
    most = config.max_captions_per_image
    if most is not None and int(case.get("captions_of_image") or 1) > most:
        return Reason.IMAGE_TOO_POPULAR
    if config.pair_duplicates_by_phash and case.get("same_phash_and_caption") == "yes":
        return Reason.NEAR_DUPLICATE
    return None


@pytest.mark.parametrize("name", PRESETS)
def test_every_border_case_gets_the_verdict_written_by_hand(name: str) -> None:
    judge, image, selection = resolve(name)
    rows = cases(name)
    assert len(rows) >= 40
    captions = [written(case["caption"]) for case in rows]
    urls = [case["url"] or "https://img.example.com/a.jpg" for case in rows]
    judged = judge_pairs(pa.table({"url": urls, "caption": captions}), load_rules(judge))
    wrong = []
    for case, verdict in zip(rows, judged["reason"].to_pylist(), strict=True):
        most = judge.max_caption_count
        if verdict is None and most is not None and int(case["links_with_caption"] or 1) > most:
            verdict = Reason.CAPTION_TOO_FREQUENT.value
        verdict = verdict or judge_picture(case, image.limits) or select(case, selection) or "ok"
        if verdict != case["expected"]:
            wrong.append(f"{case['caption']!r} {case['why']!r}: {verdict}, by hand {case['expected']}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", PRESETS)
def test_every_expected_verdict_exists_and_every_case_says_why(name: str) -> None:
    rows = cases(name)
    assert {case["expected"] for case in rows} <= {"ok", *Reason}
    assert all(case["why"] for case in rows)
    assert len({tuple(case.items()) for case in rows}) == len(rows)


def test_the_placeholders_are_as_long_as_they_say() -> None:
    assert len(written("<1001 chars>")) == 1001 == len(" ".join(written("<1001 chars>").split()))
    assert len(set(written("<257 words>").split())) == 257
    assert [len(word) for word in written("<3 words of 4 chars>").split()] == [4, 4, 4]
    assert [len(word) for word in {*written("<20 words of 100 chars>").split()}] == [100] * 20


def dotted(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= dotted(value, f"{above}{key}.") if isinstance(value, dict) else {above + key: value}
    return flat


@pytest.mark.parametrize("each", PRESETS.values(), ids=PRESETS)
def test_every_setting_is_cited_and_stands_in_the_document(each: Preset) -> None:
    settings = dotted(each.settings)
    assert settings.keys() == each.citations.keys()
    assert all(len(source) > 15 for source in each.citations.values())
    document = (Path(__file__).parents[2] / "docs" / "presets.md").read_text(encoding="utf-8")
    section = document.split(f"\n## `{each.name}`\n")[1].split("\n## ")[0]
    missing = [name for name in settings if f"`{name}`" not in section]
    missing += [rule.rule for rule in each.unapplied if rule.rule not in section]
    assert not missing


@pytest.mark.parametrize("name", PRESETS)
def test_settings_are_fields_and_settings_of_unapplied_rules_are_too(name: str) -> None:
    resolve(name)
    for rule in PRESETS[name].unapplied:
        if rule.setting:
            section, field = rule.setting.split(".")
            assert field in SECTIONS[section].model_fields


def test_a_preset_is_overridable() -> None:
    judge, _, _ = resolve("align")
    assert resolve_config(judge, sets=["min_words=2"]).min_words == 2


def test_a_ratio_just_below_three_refuses_three_and_nothing_else() -> None:
    # The limit is compared as long > limit * short: exact for every size an image can have.
    limit = preset("align").settings["image"]["limits"]["max_aspect_ratio"]
    assert limit < 3
    assert math.nextafter(limit, 4) == 3
    for short in range(1, 65_536):
        assert 3 * short > limit * short
        assert not 3 * short - 1 > limit * short


def test_no_preset_of_that_name() -> None:
    with pytest.raises(BadInput, match=r"no preset 'datacomp'.*Did you mean 'datacomp-basic'.*align, coyo"):
        preset("datacomp")


def test_an_unapplied_rule_is_applied_once_its_setting_is_given() -> None:
    coyo = preset("coyo")
    bare = {"judge": {"blocked_words": None}, "select": {"contaminants": (), "min_scores": {}}}
    before = coyo.unapplied_rules(bare)
    assert len(before) == len(coyo.unapplied)
    assert all(rule.startswith("coyo: ") for rule in before)
    after = coyo.unapplied_rules(bare | {"judge": {"blocked_words": "words.txt"}})
    assert len(after) == len(before) - 1
    assert not any("profanity" in rule for rule in after)
    assert preset("none").unapplied_rules(bare) == []
