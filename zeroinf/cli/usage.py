"""Says usage errors of click as zeroinf says its own: one message, and a hint with what was probably meant."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

import click

from zeroinf.errors import UsageError


class HintedError(click.UsageError):
    """A usage error that knows what to do about it."""

    def __init__(self, message: str, hint: str, ctx: click.Context | None = None) -> None:
        super().__init__(message, ctx)
        self.hint = hint

    def format_message(self) -> str:
        """The message in click's words."""
        return f"{self.message}: {self.hint}"


_COMMANDS = {
    "generate": "run",
    "run-batch": "run",
    "complete": "run",
    "completions": "run",
    "benchmark": "bench",
    "perplexity": "eval",
    "evaluate": "eval",
    "estimate": "plan",
    "env": "doctor",
    "info": "doctor",
    "check": "doctor",
    "list": "models",
    "ls": "models",
    "catalog": "models",
    "cache": "models",
    "pull": "download",
    "fetch": "download",
    "get": "download",
    "server": "serve",
    "kill": "stop",
    "version": "--version",
    "help": "--help",
}
"""Words that begin commands elsewhere, and what does the same here."""


def no_such_command(name: str, known: Sequence[str], ctx: click.Context) -> HintedError:
    """The error for a word that is no command, with the one that was probably meant."""
    path = ctx.command_path
    near = get_close_matches(name.lower(), known, n=1)
    if "run" in known and ("/" in name or name.endswith(".gguf")):
        hint = f"to run that model: {path} run {name} --prompt TEXT"
    elif near:
        hint = f"did you mean {path} {near[0]}?"
    elif (same := _COMMANDS.get(name.lower())) in known or same in ("--version", "--help"):
        hint = f"did you mean {path} {same}?"
    else:
        hint = f"one of {', '.join(known)}"
    return HintedError(f"no such command: {path} {name}", hint, ctx)


def explained(error: click.ClickException, words: Sequence[str]) -> UsageError:
    """Turn `error` into an error of zeroinf; `words` are what the user typed."""
    ctx = error.ctx if isinstance(error, click.UsageError) else None
    if ctx is not None and ctx.parent is not None and (other := _of_other_programs(ctx, words)):
        return _no_such_option(ctx, other)
    if isinstance(error, click.NoSuchOption):
        return _no_such_option(ctx, error.option_name)
    if isinstance(error, HintedError):
        return UsageError(error.message, hint=error.hint)
    if isinstance(error, click.MissingParameter):
        return _missing(ctx, error)
    if isinstance(error, click.BadParameter):
        return _bad_value(ctx, error)
    if (extra := error.message.partition("Got unexpected extra argument")[2]) and ctx is not None:
        return _unexpected(ctx, extra.partition("(")[2].removesuffix(")"))
    return UsageError(_plain(error.format_message()))


def _of_other_programs(ctx: click.Context, words: Sequence[str]) -> str | None:
    """A flag of several letters behind one dash, such as `-ngl`, of which click reads the first letter alone."""
    from zeroinf.options.foreign import is_foreign

    known = {flag for one in ctx.command.get_params(ctx) for flag in one.opts}
    names = (word.partition("=")[0] for word in words if word.startswith("-") and not word.startswith("--"))
    return next((name for name in names if len(name) > 2 and name not in known and is_foreign(name)), None)


def _no_such_option(ctx: click.Context | None, name: str) -> UsageError:
    from zeroinf.options.foreign import advice

    if ctx is None:
        return UsageError(f"no such option: {name}")
    hint = advice(name, _written(ctx)) or f"{ctx.command_path} {_all_help(ctx)} lists those that there are"
    return UsageError(f"no such option: {name}", hint=hint)


def _written(ctx: click.Context) -> dict[str, str]:
    """The flags of a command by their plain names; an alias stands for itself."""
    options = [one for one in ctx.command.get_params(ctx) if isinstance(one, click.Option) and not one.hidden]
    flags = [flag for one in options for flag in (*one.opts, *one.secondary_opts) if flag.startswith("--")]
    return {flag[2:].replace("-", "_"): flag for flag in flags}


def _all_help(ctx: click.Context) -> str:
    names = {flag for one in ctx.command.get_params(ctx) for flag in one.opts}
    return "--help-all" if "--help-all" in names else "--help"


def _missing(ctx: click.Context | None, error: click.MissingParameter) -> UsageError:
    parameter = error.param
    if parameter is None or ctx is None:
        return UsageError(_plain(error.format_message()))
    if parameter.name == "model":
        how = "MODEL" if getattr(parameter, "argument", None) else "--model MODEL"
        return UsageError("no model is named", hint=f"{ctx.command_path} {how}; the model `demo` needs no download")
    flag = _flag_of(parameter, ctx)
    choices = f"one of {', '.join(parameter.type.choices)}" if isinstance(parameter.type, click.Choice) else None
    return UsageError(f"{flag} is missing", hint=choices or f"{ctx.command_path} --help")


def _bad_value(ctx: click.Context | None, error: click.BadParameter) -> UsageError:
    parameter = error.param
    if parameter is None:
        return UsageError(_plain(error.format_message()))
    from zeroinf.options.definition import choice_hint

    flag, message = _flag_of(parameter, ctx), _plain(error.message)
    if not isinstance(parameter.type, click.Choice):
        message = message.replace("not a valid integer range", "no whole number")
        hint = "it takes the name of a file" if isinstance(parameter.type, click.Path) and " '{" in message else None
        return UsageError(f"{flag}: {message.replace('not a valid float range', 'no number')}", hint=hint)
    given = message.partition("' is not one of ")[0].lstrip("'")
    return UsageError(
        f"{flag}: no choice {given!r}",
        hint=choice_hint(given, list(parameter.type.choices), getattr(parameter.type, "aliases", ())),
    )


def _flag_of(parameter: click.Parameter, ctx: click.Context | None) -> str:
    """The parameter as the user writes it and, where the value came from the environment, the variable."""
    if isinstance(parameter, click.Argument):
        return parameter.make_metavar(ctx) if ctx is not None else str(parameter.name)
    flag = next((flag for flag in parameter.opts if flag.startswith("--")), parameter.opts[0])
    hint = parameter.get_error_hint(ctx)
    return flag + hint[hint.find(" (set by ") :] if " (set by " in hint else flag


def _unexpected(ctx: click.Context, words: str) -> UsageError:
    flags = _written(ctx)
    usage = ctx.get_usage().partition(": ")[2]
    hint = "a prompt goes behind --prompt, in quotes" if "prompt" in flags else usage
    return UsageError(f"unexpected: {words}", hint=hint)


def _plain(message: str) -> str:
    """A sentence of click's as a part of one of ours."""
    message = message.rstrip(".")
    return message[:1].lower() + message[1:] if message[1:2].islower() else message
