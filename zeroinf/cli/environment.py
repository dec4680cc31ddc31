"""Lets environment variables set the options of every command: each option has a variable named after its flag.

`zeroinf run --batch-size 16` is ZEROINF_RUN_BATCH_SIZE=16: the command, then the flag, with dashes as underscores. A
value is taken whole: an option that may be given several times takes one value from the environment. An empty variable
counts as not set. A flag on the command line overrides the environment, and the environment overrides the default.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from zeroinf.cli.ranks import BY_HOSTFILE
from zeroinf.cli.usage import HintedError
from zeroinf.options.definition import Section

_Command = TypeVar("_Command", bound=Callable[..., Any])

VARIABLES: Mapping[str, str] = {
    "ZEROINF_CACHE": "folder of what can be made again: converted checkpoints, measured rates, digests",
    BY_HOSTFILE: "set by --hostfile for the ranks that it starts",
    "DS_ACCELERATOR": "cpu computes on the CPU, whatever GPUs there are",
    "CUDA_VISIBLE_DEVICES": "the GPUs that may be used",
    "HF_HOME": "where Hugging Face's libraries keep models",
    "HF_HUB_OFFLINE": "1 asks no hub: models must be here already",
}
"""What else is read from the environment, and what it means."""


class EnvironmentOption(click.Option):
    """An option that the environment can set, and that help shows in a section.

    With `argument`, the name of an argument of the same command, its value may be written there instead; `foreign` are
    options of the same command, named as in other programs, that set it as well.
    """

    def __init__(
        self,
        *declared: Any,
        section: Section = "everyday options",
        argument: str | None = None,
        foreign: Sequence[click.Option] = (),
        **attributes: Any,
    ) -> None:
        super().__init__(*declared, **attributes)
        self.section, self.argument, self.foreign = section, argument, foreign

    def consume_value(self, ctx: click.Context, opts: Mapping[str, Any]) -> tuple[Any, ParameterSource]:
        """The value and its source. Raises a usage error where the command line has two."""
        value, source = super().consume_value(ctx, opts)
        for one in self.foreign:
            if (theirs := opts.get(str(one.name))) is not None:
                if source is ParameterSource.COMMANDLINE:
                    raise HintedError(f"{self.opts[-1]} and {one.opts[0]} say the same", "drop one of them", ctx)
                value, source = one.type_cast_value(ctx, theirs), ParameterSource.COMMANDLINE
        written = opts.get(self.argument) if self.argument is not None else None
        if not isinstance(written, str):
            return value, source
        if source is ParameterSource.COMMANDLINE:
            hint = f"drop one of them{'; a prompt goes behind --prompt' if 'prompts' in _names(ctx) else ''}"
            raise HintedError(f"the {self.name} is given twice, as {value!r} and as {written!r}", hint, ctx)
        return written, ParameterSource.COMMANDLINE

    def variables(self, prefix: str) -> dict[str, bool]:
        """The names that set it, those of the command beginning with `prefix`, and whether each switches it off."""
        switches = (*((name, False) for name in self.opts), *((name, True) for name in self.secondary_opts))
        return {_variable(prefix, flag): off for flag, off in switches if flag.startswith("--")}

    def value_from_envvar(self, ctx: click.Context) -> Any:
        """The value that the environment gives it, None where there is none. Raises a usage error where two do."""
        found = self.variable_set(ctx)
        if found is None:
            return None
        value = os.environ[found]
        if self.variables(ctx.auto_envvar_prefix or "")[found]:
            return not click.BOOL.convert(value, self, ctx)
        return (value,) if self.multiple else value

    def variable_set(self, ctx: click.Context) -> str | None:
        """The variable that sets it, None where there is none. Raises a usage error where two do."""
        names = self.variables(ctx.auto_envvar_prefix) if ctx.auto_envvar_prefix else {}
        found = [name for name in names if os.environ.get(name)]
        if len(found) > 1:
            raise HintedError(f"{' and '.join(found)} set the same option", "unset one of them", ctx)
        return found[0] if found else None

    def get_error_hint(self, ctx: click.Context | None) -> str:
        """Its flags and, where a wrong value came from the environment, the variable."""
        hint = super().get_error_hint(ctx)
        if ctx is None or self.name is None or ctx.get_parameter_source(self.name) is not ParameterSource.ENVIRONMENT:
            return hint
        return f"{hint} (set by {self.variable_set(ctx)})"


def _names(ctx: click.Context) -> set[str | None]:
    return {one.name for one in ctx.command.params}


def option(*flags: str, **attributes: Any) -> Callable[[_Command], _Command]:
    """Do what click's `option` does, for an option that the environment can set as well."""
    return click.option(*flags, cls=EnvironmentOption, **attributes)


def variables_of(command: click.Command, prefix: str) -> Iterator[str]:
    """Every variable that sets an option of `command`, or of one below it."""
    for parameter in command.params:
        if isinstance(parameter, EnvironmentOption):
            yield from parameter.variables(prefix)
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield from variables_of(below, _variable(prefix, name))


def refuse_unknown(command: click.Command, prefix: str) -> None:
    """Raise a usage error for a variable that begins as those of `command` do and sets none of its options."""
    if os.environ.get(f"{prefix}_PORT", "").startswith("tcp://"):
        raise HintedError(
            f"{prefix}_PORT was set by Kubernetes for a service of that name, and is this command's --port as well",
            "give the service another name, or set enableServiceLinks: false in the pod",
        )
    known = sorted(variables_of(command, prefix))
    unknown = sorted(name for name in os.environ if name.startswith(f"{prefix}_") and name not in known)
    if not unknown:
        return
    near = difflib.get_close_matches(
        unknown[0].removeprefix(prefix), [name.removeprefix(prefix) for name in known], n=1
    )
    hint = f"did you mean {prefix}{near[0]}?" if near else f"zeroinf config show {command.name} lists those that do"
    raise HintedError(f"{unknown[0]} in the environment sets no option", hint)


def prefix_of(*commands: str) -> str:
    """The beginning of a command's variables: of `zeroinf bench compare`, ZEROINF_BENCH_COMPARE."""
    prefix = "ZEROINF"
    for name in commands:
        prefix = _variable(prefix, name)
    return prefix


def _variable(prefix: str, name: str) -> str:
    return f"{prefix}_{name.removeprefix('--').replace('-', '_').upper()}"
