"""The opt-outs a server states in the headers of an answer: ``X-Robots-Tag`` and ``tdm-reservation``."""

import re
from collections.abc import Collection, Iterable

# `max-snippet: 50` and its like are directives with a value, not an agent with directives.
_VALUED = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")
_SCOPE = re.compile(r"^\s*([A-Za-z0-9_.*/-]+)\s*:\s*(.*)$")


def is_opted_out(headers: Iterable[str], directives: Collection[str], agent: str) -> bool:
    """Whether any header value holds one of ``directives`` for everyone or for ``agent``.

    ``googlebot: noindex, nofollow`` speaks to googlebot only, up to the end of the value or to the next agent.
    """
    wanted = {directive.lower() for directive in directives}
    return any(_speaks_to_us(value, wanted, agent.lower()) for value in headers)


def is_tdm_reserved(headers: Iterable[str]) -> bool:
    """Whether a ``tdm-reservation`` header reserves the rights to text and data mining: its value is 1.

    https://www.w3.org/community/reports/tdmrep/CG-FINAL-tdmrep-20240510/, section 6.
    """
    return any(value.strip() == "1" for value in headers)


def _speaks_to_us(value: str, wanted: set[str], agent: str) -> bool:
    addressed = True
    for token in value.split(","):
        scope = _SCOPE.match(token)
        if scope and scope[1].lower() not in _VALUED:
            addressed, token = scope[1].lower() in (agent, "*"), scope[2]
        if addressed and token.strip().lower() in wanted:
            return True
    return False
