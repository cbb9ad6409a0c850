"""Functions named ``module:function``."""

import pytest

from coca.errors import BadInput
from pipelines.factories import load_factory
from pipelines.scorer import ScorerSpec


def test_factories_by_name() -> None:
    assert load_factory("pipelines.scorer:ScorerSpec") is ScorerSpec
    for text in ("no_such_module:f", "pipelines.scorer:none", "pipelines.scorer", ":f"):
        with pytest.raises(BadInput, match="cannot load"):
            load_factory(text)
    with pytest.raises(BadInput, match="is no function"):
        load_factory("pipelines.scorer:SCORES")
