"""Makes flags of the definitions of options, and defines the types of values that the command line reads."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from zeroinf.cli.environment import option
from zeroinf.errors import UsageError
from zeroinf.options.definition import Definition, Options, definitions, from_parameters
from zeroinf.options.options import (
    EngineOptions,
    LimitOptions,
    ParallelOptions,
    RestOptions,
    TransferOptions,
    ZeroOptions,
)
from zeroinf.sizes import Share, parse_size, parse_size_or_share

_Command = TypeVar("_Command", bound=Callable[..., Any])
_Options = TypeVar("_Options", bound=Options)


class AliasedChoice(click.Choice):  # type: ignore[type-arg]  # older releases of click have it without one
    """One of `choices`; `aliases` are other names for some of them, which help does not list."""

    def __init__(self, choices: Sequence[str], aliases: Mapping[str, str]) -> None:
        super().__init__(choices)
        self.aliases = aliases

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The choice; a usage error for what is none."""
        return super().convert(self.aliases.get(value, value), param, ctx)


class TextType(click.types.StringParamType):
    """Words that a model reads: bytes of the command line that the locale has no characters for are UTF-8."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The text; as it is where it is none in UTF-8 either."""
        text = super().convert(value, param, ctx)
        try:
            text.encode()
        except UnicodeEncodeError:
            with suppress(UnicodeError):
                return os.fsencode(text).decode()
        return text


class SizeType(click.ParamType):  # type: ignore[type-arg]
    """A size as `24GiB` (binary), `24GB` (decimal) or `4096B`, converted to bytes."""

    name = "size"

    def __init__(self, *, multiple_of: int = 1) -> None:
        self.multiple_of = multiple_of

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes of `value`; a usage error names what is wrong with it."""
        if isinstance(value, int):
            return value
        try:
            return parse_size(value, multiple_of=self.multiple_of)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class LimitType(click.ParamType):  # type: ignore[type-arg]
    """A size, converted to bytes, or a share such as `90%`."""

    name = "size|percent"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | Share:
        """What `value` says; a usage error names what is wrong with it."""
        if isinstance(value, (int, Share)):
            return value
        try:
            return parse_size_or_share(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class ForeignType(click.ParamType):  # type: ignore[type-arg]
    """What a flag of another program takes, converted to the value of an option of ours that means the same."""

    name = "value"

    def __init__(self, convert: Callable[[str], Any]) -> None:
        self._convert = convert

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Our value; a usage error says what is wrong with theirs."""
        try:
            return self._convert(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class JsonObjectType(click.ParamType):  # type: ignore[type-arg]
    """A JSON object, converted to a dict."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        """The object; a usage error says what is wrong with it."""
        if isinstance(value, dict):
            return value
        try:
            found = json.loads(value)
        except ValueError as error:
            self.fail(f"{value!r} is no JSON: {error}", param, ctx)
        if not isinstance(found, dict):
            self.fail(f"{value!r} is no JSON object", param, ctx)
        return found


class FiniteFloat(click.FloatRange):
    """A number within bounds; `nan` and infinities, which Python reads as numbers and which no bound stops, are not."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """`value` as a number; a usage error says why it is none."""
        number = float(super().convert(value, param, ctx))
        if not isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


class InjectionPolicyType(click.ParamType):  # type: ignore[type-arg]
    """`Block=attention.output,mlp.output`: a class of blocks and the layers whose results are summed."""

    name = "Block=layer,layer"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, tuple[str, ...]]:
        """The class's name and the layers'."""
        block, _, layers = str(value).partition("=")
        names = tuple(filter(None, layers.split(",")))
        if not block or not names:
            self.fail(f"{value!r}: write LlamaDecoderLayer=self_attn.o_proj,mlp.down_proj", param, ctx)
        return block, names


class AutoIntType(click.ParamType):  # type: ignore[type-arg]
    """A whole number, or `auto`, which is None and leaves it to the planner."""

    name = "integer|auto"

    def __init__(self, *, minimum: int) -> None:
        self.minimum = minimum

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """The number, None for `auto`; a usage error for all else."""
        if value == "auto":
            return None
        number = int(value) if str(value).isdecimal() else -1
        if number < self.minimum:
            self.fail(f"{value!r} is neither `auto` nor a whole number from {self.minimum} on", param, ctx)
        return number


def options_of(
    group: type[Options], *, only: Sequence[str] | None = None, required: bool = True
) -> Callable[[_Command], _Command]:
    """The flags of a group of options, or of those that `only` names, in the order of their definitions.

    The command gets a parameter by each definition's name: what `from_parameters` takes. Where not `required`, none of
    them has to be given.
    """
    chosen = [one for one in definitions(group) if only is None or one.name in only]

    def decorate(command: _Command) -> _Command:
        for one in reversed(chosen):
            argument = f"{one.name}_written" if one.option.positional and required else None
            command = _flag(one, required=required, argument=argument)(command)
            if argument is not None:
                written = {"metavar": f"[{one.name.upper()}]", "required": False, "expose_value": False}
                written["shell_complete"] = complete_models
                command = click.argument(argument, **written)(command)  # type: ignore[arg-type]
        return command

    return decorate


def loading_options(command: _Command) -> _Command:
    """The flags that say how a model of this process is loaded and runs, in the order in which help lists them."""
    for group in (ZeroOptions, LimitOptions, ParallelOptions, TransferOptions, RestOptions, EngineOptions):
        command = options_of(group)(command)
    return command


def _flag(one: Definition, *, required: bool, argument: str | None) -> Callable[[_Command], _Command]:
    known, attributes = one.option, dict[str, Any]()
    flags = one.flags
    if one.type is bool:
        switch = one.flag
        flags = (f"{switch}/{switch.replace('--', '--no-', 1)}",) if one.default else flags
        attributes["is_flag"] = True
    else:
        is_many = get_origin(one.type) is tuple
        attributes["multiple"] = is_many
        attributes["type"] = _type_of(one, get_args(one.type)[0] if is_many else one.type)
    if one.default is MISSING:
        attributes["required"] = required
    elif one.default is None and known.auto:
        attributes["default"] = "auto"
    elif known.is_size and one.default is not None:
        attributes["default"] = f"{one.default >> 20}MiB"
    elif one.default not in (None, ()):
        attributes["default"] = one.default
    if known.positional:
        attributes["shell_complete"] = complete_models
    others = [
        click.Option([flag], type=ForeignType(convert), hidden=True, expose_value=False)
        for flag, convert in known.foreign.items()
    ]
    attributes |= {"section": known.section, "argument": argument, "foreign": others, "hidden": known.hidden}
    declared = option(*flags, one.name, help=known.help, **attributes)

    def decorate(command: _Command) -> _Command:
        command.__dict__.setdefault("__click_params__", []).extend(others)  # as click's decorators keep them
        return declared(command)

    return decorate


def complete_models(ctx: click.Context, parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """Complete the beginning of a model's name: models on this machine, of the catalog, or a path."""
    from zeroinf.model.catalog import catalog_names
    from zeroinf.model.local import local_models

    names = dict.fromkeys([*(model.name for model in local_models()), *catalog_names()])
    found = [CompletionItem(name) for name in names if name.startswith(begun)]
    return found or [CompletionItem(begun, type="file")]


def _type_of(one: Definition, written: Any) -> Any:
    """Let click convert the text of a value."""
    known = one.option
    if one.choices:
        return AliasedChoice(one.choices, known.aliases)
    if known.is_text:
        return TextType()
    if written is Path:
        return click.Path(path_type=Path, **_PATHS[known.path])
    if written is dict:
        return JsonObjectType()
    if get_origin(written) is tuple:
        return InjectionPolicyType()
    if known.is_limit:
        return LimitType()
    if known.is_size:
        return SizeType(multiple_of=known.multiple_of)
    if written is int and known.auto:
        return AutoIntType(minimum=int(known.minimum or 0))
    if written is int and known.minimum is not None:
        return click.IntRange(int(known.minimum), None if known.maximum is None else int(known.maximum))
    if written is float:
        return FiniteFloat(known.minimum, known.maximum, min_open=known.above)
    return written


_PATHS: dict[str, dict[str, bool]] = {
    "any": {},
    "file": {"dir_okay": False},
    "existing file": {"exists": True, "dir_okay": False},
    "folder": {"file_okay": False},
}


def asked_of(ctx: click.Context, options: type[_Options], given_: Mapping[str, Any], **more: Any) -> _Options:
    """Options from a command's parameters; `more` are other fields."""
    explicit = frozenset(given(ctx, *given_))
    return from_parameters(options, given_, explicit, **more)


def given(ctx: click.Context, *names: str) -> list[str]:
    """The parameters among `names` that the user set for this command, by a flag or in the environment."""
    explicit = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
    return [name for name in names if ctx.get_parameter_source(name) in explicit]


def refuse_group_options(ctx: click.Context) -> None:
    """Refuse flags that stand between a group and the command below it, for which they would mean nothing.

    Raises:
        UsageError: naming the flags.
    """
    named = [name for name in ctx.params if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if named:
        raise UsageError(
            f"{flags(ctx, named)} has no effect before `{ctx.invoked_subcommand}`",
            hint="write it after the command, or drop it",
        )


def flags(ctx: click.Context, names: list[str]) -> str:
    """The parameters `names` as the user writes them."""
    return ", ".join("/".join(p.opts + p.secondary_opts) for p in ctx.command.params if p.name in names)
