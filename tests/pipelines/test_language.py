"""The language of a caption."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from py3langid.langid import MODEL_FILE, LanguageIdentifier

from coca.errors import BadInput
from pipelines.language import check_languages, identify

CAPTIONS = {
    "a man riding a horse on the beach": "en",
    "ein roter Kreis auf weißem Grund": "de",
    "un cercle rouge sur un fond blanc": "fr",
    "красный круг на белом фоне": "ru",
    "猫がソファーで寝ている": "ja",
    "고양이가 소파에서 자고 있다": "ko",
}


def test_languages() -> None:
    assert identify(CAPTIONS) == list(CAPTIONS.values())


def test_the_answers_are_those_of_the_package() -> None:
    plain = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    captions = [*CAPTIONS, "a dog", "zwei Hunde", "Thumbnail 12 of 40", "l'été à la mer"]
    plain.set_languages([label for label in plain.labels if len(label) == 2 or label == "zxx"])
    assert identify(captions) == [plain.classify(caption)[0] for caption in captions]


@pytest.mark.parametrize("caption", ["", "1234", "1920x1080", "...", "\x00\x01"])
def test_nothing_to_tell_by(caption: str) -> None:
    assert identify([caption]) == [None]


def test_too_little_to_be_sure() -> None:
    assert identify(["a man riding a horse on the beach", "house"], min_confidence=0.5) == ["en", None]
    assert identify(["house"]) == ["en"]


def test_only_the_start_is_read() -> None:
    german = " ".join(["ein roter Kreis auf weißem Grund"] * 40)[:1000]
    assert identify([german + " a man riding a horse on the beach" * 1000]) == ["de"]


def test_a_run_of_marks_takes_no_time() -> None:
    identify(["loaded"])
    started = time.process_time()
    identify(["a" + "\u0301\u0323" * 500_000])
    assert time.process_time() - started < 1


def test_threads_agree() -> None:
    captions = list(CAPTIONS) * 50
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(identify, [captions] * 8))
    assert answers == [list(CAPTIONS.values()) * 50] * 8


def test_codes_are_checked_and_the_nearest_is_named() -> None:
    check_languages(["en", "de", "zh"])
    with pytest.raises(BadInput, match=r"'EN' is no language.*Did you mean 'en'"):
        check_languages(["EN"])
    with pytest.raises(BadInput, match=r"'zxx' is no language"):
        check_languages(["zxx"])


def test_the_model_is_loaded_only_when_it_is_asked() -> None:
    check = "import sys, pipelines.judge; assert 'py3langid.langid' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)
