"""What click says of a mistyped command line, in the words of the other mistakes: small letter, no full stop, what to do."""

from __future__ import annotations

import re

import click


def words(error: click.ClickException) -> str:
    """One line without the name of the program."""
    match error:
        case click.NoSuchOption():
            meant = f"; did you mean {' or '.join(error.possibilities)}?" if error.possibilities else ""
            return f"option {error.option_name} does not exist{meant}"
        case click.MissingParameter(param=click.Parameter() as param):
            choices = f"; choose from {', '.join(param.type.choices)}" if isinstance(param.type, click.Choice) else ""
            return f"{param.param_type_name} {_name(param)} is missing{choices}"
        case click.BadParameter(param=click.Parameter() as param):
            return f"{_name(param)}: {_number(error.message).rstrip('.')}"
        case click.BadOptionUsage():
            return _plain(error.message.replace(repr(error.option_name), error.option_name))
    return _plain(error.format_message())


def _name(param: click.Parameter) -> str:
    """--pattern, or CHECKPOINT."""
    return param.opts[0] if isinstance(param, click.Option) else param.human_readable_name


def _number(message: str) -> str:
    """click names its own types: "is not a valid integer range"."""
    message = re.sub(r"is not a valid integer( range)?\.$", "is not a whole number", message)
    return re.sub(r"is not a valid float( range)?\.$", "is not a number", message)


def _plain(message: str) -> str:
    return message[:1].lower() + message[1:].rstrip(".")
