"""API keys of commands: from the environment or a file, never the command line, which all users can read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from zeroinf.cli.environment import option
from zeroinf.errors import UsageError

_Command = TypeVar("_Command", bound=Callable[..., Any])


def api_key_options(command: str, use: str) -> Callable[[_Command], _Command]:
    """`--api-key` and `--api-key-file` of `command`; `use` says what the key is for, as "that clients must send"."""
    variable = f"ZEROINF_{command.upper()}_API_KEY"

    def decorate(decorated: _Command) -> _Command:
        file = option(
            "--api-key-file",
            type=click.Path(path_type=Path, exists=True, dir_okay=False),
            help=f"File whose first line is the key {use}.",
        )
        key = option(
            "--api-key", help=f"Key {use}. Taken from the environment ({variable}), never from the command line."
        )
        return key(file(decorated))

    return decorate


def api_key(ctx: click.Context, asked: dict[str, Any]) -> str | None:
    """The key that the environment or a file gives; takes the two options out of `asked`. Raises UsageError."""
    key, file = asked.pop("api_key"), asked.pop("api_key_file")
    variable = f"ZEROINF_{str(ctx.info_name).upper()}_API_KEY"
    if ctx.get_parameter_source("api_key") is ParameterSource.COMMANDLINE:
        raise UsageError(
            "--api-key on the command line: every user of this machine can read it there",
            hint=f"set {variable} in the environment, or pass --api-key-file",
        )
    if key is not None and file is not None:
        raise UsageError(f"{variable} and --api-key-file are both given", hint="drop one of them")
    if file is None:
        return None if key is None else str(key)
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read --api-key-file {file}: {error}") from error
    return lines[0].strip() if lines else ""
