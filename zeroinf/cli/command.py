"""Commands and groups of the command line: help in sections, short unless all of it is asked for, and no option of one
value twice.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, get_args

import click

from zeroinf.cli.environment import EnvironmentOption
from zeroinf.cli.usage import no_such_command
from zeroinf.options.definition import Section

_Function = TypeVar("_Function", bound=Callable[..., Any])
_ALL = f"{__name__}.all"
_EVERYDAY = "everyday options"


class _Sectioned(click.Command):
    """A command whose options stand in sections."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take the arguments. Raises a usage error for an option of one value that is given twice."""
        if not ctx.resilient_parsing:
            self._refuse_doubled(ctx, args)
        return super().parse_args(ctx, args)

    def _refuse_doubled(self, ctx: click.Context, args: Sequence[str]) -> None:
        """click would take the last one."""
        try:
            _, _, order = self.make_parser(ctx).parse_args(list(args))
        except click.UsageError:  # is said when they are parsed
            return
        for one in order:
            if not isinstance(one, click.Option) or one.multiple or one.count or order.count(one) < 2:
                continue
            if not one.is_flag:
                written = {word.partition("=")[0] for word in args}
                name = next((flag for flag in reversed(one.opts) if flag in written), one.opts[-1])
                raise click.UsageError(f"{name} is given twice, but takes one value", ctx)
            if one.secondary_opts and not {*one.opts, *one.secondary_opts}.isdisjoint(args):
                both = " and ".join((one.opts[-1], one.secondary_opts[-1]))
                raise click.UsageError(f"{both}: one of them, and once", ctx)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The parameters, with --help-all where --help does not show all."""
        found = super().get_params(ctx)
        return [*found, _HELP_ALL] if any(_section(one) != _EVERYDAY for one in self.params) else found

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections: all with --help-all, else those of every day, and of the others the flags alone."""
        sections: dict[str, list[click.Parameter]] = {name: [] for name in get_args(Section)}
        for one in self.get_params(ctx):
            if isinstance(one, click.Option) and one.get_help_record(ctx) is not None:
                sections[_section(one)].append(one)
        in_full, rest = ctx.meta.get(_ALL, False), dict[str, str]()
        alone = not any(sections[name] for name in sections if name != _EVERYDAY)
        for name, options in sections.items():
            if not options:
                continue
            if name == _EVERYDAY or in_full:
                title = "Options" if alone else f"{name[0].upper()}{name[1:]}"
                with formatter.section(title):
                    formatter.write_dl([record for one in options if (record := one.get_help_record(ctx))])
            else:
                rest[name] = ", ".join(_flag(one) for one in options)
        if rest:
            with formatter.section(f"More options ({ctx.command_path} --help-all says what they do)"):
                _write_flags(formatter, rest)
        if isinstance(self, click.Group):
            self.format_commands(ctx, formatter)


class SectionedCommand(_Sectioned):
    """A command that is no group."""


class SectionedGroup(_Sectioned, click.Group):
    """A group of commands, with options of its own."""

    command_class = SectionedCommand

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that `args` begin with. Raises HintedError where there is no such command."""
        if args[0] not in self.commands and not args[0].startswith("-") and not ctx.resilient_parsing:
            raise no_such_command(args[0], sorted(self.commands), ctx)
        return super().resolve_command(ctx, args)


def command(**attributes: Any) -> Callable[[_Function], SectionedCommand]:
    """Do what click's `command` does, for a command of zeroinf."""
    return click.command(cls=SectionedCommand, **attributes)


def group(**attributes: Any) -> Callable[[_Function], SectionedGroup]:
    """Do what click's `group` does, for a group of zeroinf."""
    return click.group(cls=SectionedGroup, **attributes)


def whole_help(ctx: click.Context) -> str:
    """The help of a command with every option."""
    ctx.meta[_ALL] = True
    try:
        return ctx.get_help()
    finally:
        del ctx.meta[_ALL]


def _flag(one: click.Parameter) -> str:
    return next((flag for flag in one.opts if flag.startswith("--")), one.opts[0])


def _write_flags(formatter: click.HelpFormatter, sections: Mapping[str, str]) -> None:
    """Sections in lines that do not break within a flag."""
    indent, width = " " * formatter.current_indent, max(map(len, sections)) + 2
    for name, flags in sections.items():
        lines = textwrap.wrap(
            flags,
            formatter.width,
            initial_indent=f"{indent}{name:<{width}}",
            subsequent_indent=indent + " " * width,
            break_on_hyphens=False,
        )
        formatter.write("\n".join(lines) + "\n")


def _section(one: click.Parameter) -> str:
    return one.section if isinstance(one, EnvironmentOption) else _EVERYDAY


def _print_whole_help(ctx: click.Context, option: click.Parameter, asked: bool) -> None:
    if asked and not ctx.resilient_parsing:
        click.echo(whole_help(ctx), color=ctx.color)
        ctx.exit()


_HELP_ALL = click.Option(
    ["--help-all"],
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_whole_help,
    help="Show every option and exit.",
)
