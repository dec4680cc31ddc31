"""The `zeroinf` command: finds subcommands, and turns errors into two lines and an exit code."""

from __future__ import annotations

import errno
import importlib
import os
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

import click

import zeroinf
from zeroinf.cli.environment import prefix_of, refuse_unknown, variables_of
from zeroinf.cli.streams import steady_streams, trouble_with_stdout
from zeroinf.cli.usage import explained, no_such_command
from zeroinf.compat.imports import quicken_imports
from zeroinf.errors import EnvironmentProblem, OutputError, UsageError, ZeroinfError
from zeroinf.paths import cache_directory

_REFUSALS = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP,
    errno.EMFILE, errno.ENFILE, errno.EIO,
)  # fmt: skip
"""Errors of files that are the machine's, whoever meets them: no defect, and no traceback."""
_COMMANDS = (
    "run",
    "status",
    "chat",
    "serve",
    "ps",
    "stop",
    "plan",
    "models",
    "download",
    "eval",
    "lm-eval",
    "bench",
    "config",
    "store",
    "doctor",
    "completion",
)


class _LazyGroup(click.Group):
    """Imports a command's module when the command is needed; each is named as its command (`eval_` as `eval`, `lm_eval`
    as `lm-eval`)."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        name = cmd_name.replace("-", "_")
        module = importlib.import_module(f"zeroinf.cli.{name}")
        command: click.Command = getattr(module, "eval_" if cmd_name == "eval" else name)
        if (example := next(variables_of(command, prefix_of(cmd_name)), None)) is not None:
            command.epilog = f"Each option can be set in the environment by the name of its flag, as {example}."
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command, once it is known that no variable meant for it would be ignored; its help is always there."""
        if not ctx.resilient_parsing:
            _refuse_lost_folder()
        if args[0] not in _COMMANDS and not args[0].startswith("-") and not ctx.resilient_parsing:
            raise no_such_command(args[0], _COMMANDS, ctx)
        name, command, rest = super().resolve_command(ctx, args)
        if name and command and not ctx.resilient_parsing and {"-h", "--help", "--help-all"}.isdisjoint(rest):
            refuse_unknown(command, prefix_of(name))
        return name, command, rest

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. click takes any broken pipe for one of standard output, and ends without a word."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            if (trouble := trouble_with_stdout()) is not None:
                raise _unwritable(trouble) from error
            raise RuntimeError(f"a broken pipe: {error}") from error


@click.group(
    cls=_LazyGroup,
    context_settings={
        "auto_envvar_prefix": "ZEROINF",
        "help_option_names": ["-h", "--help"],
        "max_content_width": 110,
        "show_default": True,
    },
)
@click.version_option(zeroinf.__version__, "-V", "--version", prog_name="zeroinf")
@click.option("--local_rank", "--local-rank", type=int, hidden=True, expose_value=False)  # set by launchers
def cli() -> None:
    """Throughput inference for language models that do not fit the GPU.

    Every option can also be set in the environment, by its command and flag: ZEROINF_RUN_BATCH_SIZE=16 is `zeroinf run
    --batch-size 16`. A flag comes before the environment. `zeroinf config show run` says what holds, and why.

    \b
    Exit codes: 0 done, 1 failure, 2 usage, 3 does not fit, 4 this machine lacks
    something, 5 finished, but requests were refused or failed, 130 Ctrl-C,
    143 SIGTERM, 129 SIGHUP, 138 SIGUSR1.
    """


def main() -> NoReturn:
    """Run the command line and end the process."""
    steady_streams()
    quicken_imports(cache_directory())
    # DeepSpeed looks for ninja on PATH; it lies beside this Python, whose environment need not be active.
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    try:
        code: Any = cli.main(prog_name="zeroinf", standalone_mode=False)
    except click.exceptions.Abort:
        code = 130
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        code = error.exit_code
    except click.ClickException as error:
        code = _show(explained(error, sys.argv[1:]))
    except ZeroinfError as error:
        code = _show(error)
    except Exception as error:  # a defect: others wait for this rank, so it must end here too
        if isinstance(error, OSError) and (trouble := trouble_with_stdout()) is not None:
            code = _show(_unwritable(trouble))
        elif isinstance(error, OSError) and error.errno in _REFUSALS and error.filename:
            code = _show(EnvironmentProblem(f"{os.fspath(error.filename)}: {error.strerror}"))
        else:
            traceback.print_exc()
            code = ZeroinfError.exit_code
    _leave(code if isinstance(code, int) else 0)


def _refuse_lost_folder() -> None:
    """torch does not load where the current folder is gone."""
    try:
        Path.cwd()
    except FileNotFoundError as error:
        raise UsageError("the current folder does not exist any more", hint="cd to another one") from error


def _unwritable(error: OSError) -> OutputError:
    return OutputError(f"cannot write to standard output: {error.strerror}")


def _show(error: ZeroinfError) -> int:
    """Print the error and its hint; an error without words was told elsewhere."""
    if error.message:
        rank = os.environ.get("RANK", "0")
        _say("error:", "red", f"{f'rank {rank}: ' if rank != '0' else ''}{error.message}")
    if error.hint:
        click.echo(err=True)
        _say("hint:", "cyan", error.hint)
    return error.exit_code


def _say(label: str, colour: str, text: str) -> None:
    """A line on stderr whose label has a colour where that is a terminal that shows one."""
    plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    click.echo(f"{click.style(label, fg=colour, bold=True)} {text}", err=True, color=False if plain else None)


def _leave(code: int) -> NoReturn:
    """End the process. A rank that failed does not wait for collectives that others will never join."""
    if (trouble := trouble_with_stdout()) is not None and not code:
        code = _show(_unwritable(trouble))
    if code and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
