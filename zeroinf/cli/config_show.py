"""Implements `zeroinf config show`: the options of a command, each with its value and its source (flag, environment or
default).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import click
from click.core import ParameterSource

from zeroinf.cli.command import command
from zeroinf.cli.environment import VARIABLES, EnvironmentOption, option, prefix_of, refuse_unknown

JSON_SCHEMA = 1

Source = Literal["flag", "environment", "default"]

_SOURCES: dict[ParameterSource, Source] = {
    ParameterSource.COMMANDLINE: "flag",
    ParameterSource.ENVIRONMENT: "environment",
}


@dataclass(frozen=True, slots=True)
class OptionValue:
    """An option of a command. `variable` is the one that set it, or the one that would."""

    flag: str
    value: Any
    source: Source
    variable: str


@command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[COMMAND [FLAGS]...]")
@click.pass_context
def show(ctx: click.Context, /, command: tuple[str, ...], as_json: bool) -> None:
    """Print each option of COMMAND: its value, what gave it (flag, environment or default), and its variable.

    FLAGS count as they would behind COMMAND. Without COMMAND: what the environment sets, of all commands.

    \b
      ZEROINF_RUN_OFFLOAD=cpu zeroinf config show run --batch-size 8
      zeroinf config show --json plan
      zeroinf config show
    """
    root = ctx.find_root()
    names, found, flags = _resolve(root, command)
    chosen = [(names, found)] if names else [(names, found) for names, found in _all(root.command, root)]
    shown = {" ".join(names): settings_of(root, names, found, flags if command else ()) for names, found in chosen}
    if not command:
        shown = {name: own for name, all_ in shown.items() if (own := [s for s in all_ if s.source != "default"])}
    others = {name: os.environ.get(name) for name in VARIABLES}
    click.echo(_as_json(shown, others) if as_json else "\n".join(_lines(shown, others)))
    for names, found in chosen:
        refuse_unknown(found, prefix_of(*names))


def settings_of(
    root: click.Context, names: Sequence[str], command: click.Command, flags: Sequence[str]
) -> list[OptionValue]:
    """The options of `command`, called by `names` with `flags`. Raises a usage error for a value that is none."""
    ctx = click.Context(command, info_name=names[-1], auto_envvar_prefix=prefix_of(*names), parent=root)
    ctx.resilient_parsing = True  # a command that would lack something is shown as well
    given, _, _ = command.make_parser(ctx).parse_args(args=list(flags))
    return [
        _setting(ctx, one, given) for one in command.params if isinstance(one, EnvironmentOption) and not one.hidden
    ]


def _setting(ctx: click.Context, one: EnvironmentOption, given: dict[str, Any]) -> OptionValue:
    value, found = one.consume_value(ctx, given)
    ctx.set_parameter_source(one.name, found)
    source = _SOURCES.get(found, "default")
    if source != "default":
        one.type_cast_value(ctx, value)  # refuses what is none
    value = value if isinstance(value, (str, int, float, list, tuple)) else None  # click's mark of no default
    variables = one.variables(cast(str, ctx.auto_envvar_prefix))
    variable = one.variable_set(ctx) if source == "environment" else None
    return OptionValue(
        next(flag for flag in one.opts if flag.startswith("--")), value, source, variable or next(iter(variables))
    )


def _resolve(root: click.Context, words: Sequence[str]) -> tuple[list[str], click.Command, Sequence[str]]:
    """The command that `words` begin with, by names and itself, and the words behind them."""
    command, names = root.command, list[str]()
    while words and isinstance(command, click.Group) and not words[0].startswith("-"):
        below = command.get_command(root, words[0])
        if below is None:
            raise click.UsageError(f"no such command: zeroinf {' '.join([*names, words[0]])}")
        command, names, words = below, [*names, words[0]], words[1:]
    return names, command, words


def _all(command: click.Command, root: click.Context, *names: str) -> Iterator[tuple[list[str], click.Command]]:
    if names:
        yield list(names), command
    if isinstance(command, click.Group):
        for name in command.list_commands(root):
            below = command.get_command(root, name)
            assert below is not None
            yield from _all(below, root, *names, name)


def _lines(shown: dict[str, list[OptionValue]], others: dict[str, str | None]) -> Iterator[str]:
    for name, settings in shown.items():
        yield f"zeroinf {name}"
        rows = [(one.flag, _text(one.value), one.source, one.variable) for one in settings]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        yield ""
    yield "other variables"
    width = max(map(len, others))
    for variable, value in others.items():
        yield f"  {variable:<{width}}  {'not set' if value is None else _text(value)}  ({VARIABLES[variable]})"


def _text(value: Any) -> str:
    """A value in one line: text with what cannot be seen, or would break the line, as JSON has it."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(_text, value)) or "-"
    if value is None:
        return "-"
    plain = str(value)
    return plain if plain and plain.isprintable() and " " not in plain else json.dumps(plain)


def _as_json(shown: dict[str, list[OptionValue]], others: dict[str, str | None]) -> str:
    commands = {name: [asdict(one) for one in settings] for name, settings in shown.items()}
    return json.dumps({"schema": JSON_SCHEMA, "commands": commands, "variables": others}, indent=2, default=str)
