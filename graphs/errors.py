"""The one family of exceptions that mean "the user gave something we cannot use".

The command line prints such an exception as one line and exits with code 2. Everything else that is raised is a defect
of headpool and keeps its traceback. It lives here because `graphs` is the room that every other room may import.
"""


class UserError(ValueError):
    """What was wrong, the value, the choices, and what to do: one line."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, contradicts its config, or holds a feature headpool does not implement."""


class GraphError(UserError):
    """A graph does not have the form a lowering or a check needs."""


class BundleError(UserError):
    """A bundle is missing, damaged, or does not hold what was asked of it."""


class EngineError(UserError):
    """A runtime is not installed, cannot run here, or was given tokens outside what its session holds."""


def one_of(what: str, value: object, choices: object) -> str:
    """The message for a value outside a closed set of choices."""
    return f"{what} {value!r} is not one of {', '.join(str(c) for c in choices)}"  # type: ignore[attr-defined]


def option(name: str) -> str:
    """What the command line calls a parameter of Python: "--kv-budget" of "kv_budget"."""
    return "--" + name.replace("_", "-")
