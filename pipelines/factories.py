"""Functions of the user's, named ``module:function``."""

import importlib
from collections.abc import Callable
from typing import Any

from coca.errors import BadInput


def load_factory(text: str) -> Callable[..., Any]:
    """The function that ``module:function`` names.

    Raises:
        BadInput: no such module or function.
    """
    module_name, _, name = text.partition(":")
    way_out = "Write MODULE:FUNCTION of something installed here, for example mypackage.scorers:nsfw"
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise BadInput(f"cannot load {text!r}: {error}", way_out) from None
    if not callable(found):
        raise BadInput(f"{text!r} is no function", way_out)
    return found
