"""The language of a caption, offline: py3langid, a naive Bayes classifier over byte n-grams (Lui and Baldwin 2012,
"langid.py") in its own wheel, here over the languages that have an ISO 639-1 code.

It stands in for fastText (DataComp), CLD3 (COYO) and CLD2 (LAION-400M), whose models are not in any package we need.
Where the evidence is a word or two its guess is close to chance: the probability then is low, and says so.
"""

import difflib
from collections import Counter
from collections.abc import Iterable
from functools import cache
from typing import Any

from coca.errors import BadInput

# What the identifier reads of a caption. Its cost grows with the square of a run of combining marks.
MAX_CHARS = 1000

_NO_LANGUAGE = "zxx"


def identify(captions: Iterable[str], min_confidence: float = 0.0) -> list[str | None]:
    """The likeliest language of each caption as an ISO 639-1 code.

    None where a caption has nothing to tell by (digits, signs, an unknown script), is no language (``zxx``), or its
    likeliest language has a probability below ``min_confidence``. Probabilities are normalised over all languages.
    Read are the first ``MAX_CHARS`` characters.
    """
    model, chance = _model()
    least = max(min_confidence, chance)
    found = (model.classify(caption[:MAX_CHARS]) for caption in captions)
    return [language if probability >= least and language != _NO_LANGUAGE else None for language, probability in found]


def check_languages(languages: Iterable[str]) -> None:
    """
    Raises:
        BadInput: a code that the identifier does not know, with the nearest one.
    """
    known = [label for label in _model()[0].labels if label != _NO_LANGUAGE]
    for language in languages:
        if language not in known:
            near = difflib.get_close_matches(language.lower(), known, n=1, cutoff=0.0)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            raise BadInput(
                f"judge.languages: {language!r} is no language of the identifier",
                f"{hint}It knows {', '.join(sorted(known))}",
            )


@cache
def _model() -> tuple[Any, float]:
    """The identifier, and a probability just above that of a caption without evidence, which every class shares.

    Loaded once a process (0.7 s, 120 MB) and only read afterwards, so threads may share it.
    """
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    model = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    model.set_languages([label for label in model.labels if len(label) == 2 or label == _NO_LANGUAGE])
    classes_of_one_label = max(Counter(model.nb_classes).values())
    return model, (classes_of_one_label + 0.5) / len(model.nb_classes)
