"""What an optimizer does to each parameter: the config's rules, applied to names."""

import difflib
import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from coca.errors import BadInput
from coca.train_config import OptimizerConfig


class Treatment(NamedTuple):
    """How one parameter is updated."""

    optimizer: str
    """adamw, adafactor or muon."""
    learning_rate_factor: float
    """On that optimizer's scheduled rate; 0 for a parameter that stays as it is."""
    weight_decay: float
    """Decoupled, times the rate."""


def treatments(parameters: Mapping[str, Tensor], config: OptimizerConfig) -> dict[str, Treatment]:
    """The treatment of each parameter by its name; shapes count, values do not.

    The first rule that matches a name counts; without one, matrices decay and vectors do not.

    Raises:
        BadInput: a rule counts for no parameter.
    """
    used = set()
    found = {}
    for name, parameter in parameters.items():
        muon = config.name == "muon" and _is_hidden_matrix(name, parameter)
        optimizer = config.name if muon or config.name != "muon" else "adamw"
        factor, weight_decay = 1.0, config.weight_decay if parameter.ndim >= 2 else 0.0
        for index, rule in enumerate(config.rules):
            if re.search(rule.match, name):
                used.add(index)
                factor = rule.learning_rate_factor
                weight_decay = weight_decay if rule.weight_decay is None else rule.weight_decay
                break
        found[name] = Treatment(optimizer, factor, weight_decay)
    for index in range(len(config.rules)):
        if index not in used:
            raise _useless(index, list(parameters), config)
    return found


def _is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Muon is made for matrices between hidden states, not for those from or to pixels, tokens and positions."""
    outside = ("embedding", "positions", "queries", "registers", "head", "_projection")
    return parameter.ndim == 2 and not any(part in name for part in outside)


def _useless(index: int, names: list[str], config: OptimizerConfig) -> BadInput:
    pattern = config.rules[index].match
    rule = f"optimizer.rules[{index}].match = {pattern!r}"
    if any(re.search(pattern, name) for name in names):
        return BadInput(f"{rule} never counts: rules before it match all its parameters", "Move it before them")
    # A misspelt pattern is nearer to a piece of a name than to the whole of it.
    pieces = {".".join(name.split(".")[:end]) for name in names for end in range(1, name.count(".") + 2)}
    pieces |= {part for name in names for part in name.split(".") if not part.isdigit()}
    near = difflib.get_close_matches(pattern, sorted(pieces), n=3, cutoff=0.0)
    return BadInput(f"{rule} matches no parameter's name", f"Near to it: {', '.join(near)}")
