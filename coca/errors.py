"""The two ways a command ends badly: the user's input (exit 2) and everything else (exit 1)."""


class BadInput(ValueError):
    """Input from outside that breaks a rule: names the value and the rule, and says the way out.

    The command line prints ``cause`` and ``way_out`` on one line, without a traceback, and exits 2.
    """

    def __init__(self, cause: str, way_out: str = "") -> None:
        self.cause = cause.rstrip(".")
        self.way_out = way_out.rstrip(".")
        super().__init__(" ".join(_sentence(part) for part in (self.cause, self.way_out) if part))

    def __reduce__(self) -> tuple[type["BadInput"], tuple[str, str]]:
        # Ray pickles exceptions; the default would call __init__ with the joined message.
        return type(self), (self.cause, self.way_out)


def _sentence(text: str) -> str:
    return text if text.endswith("?") else f"{text}."


class RunFailed(RuntimeError):
    """Work that was rightly asked for and could not be done (exit 1)."""

    repeat_helps = True
    """False where the same would come of it again, as long as nothing is changed; set on the error that is raised."""
