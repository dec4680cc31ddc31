"""The `zeroinf` command: finds subcommands, and turns errors into two lines and an exit code."""

from __future__ import annotations

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
from zeroinf.compat.dynamo import defer_dynamo
from zeroinf.errors import OutputError, ZeroinfError

_COMMANDS = (
    "run",
    "status",
    "chat",
    "serve",
    "ps",
    "stop",
    "plan",
    "eval",
    "lm-eval",
    "bench",
    "config",
    "store",
    "doctor",
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
        name, command, rest = super().resolve_command(ctx, args)
        if name and command and not ctx.resilient_parsing and {"-h", "--help"}.isdisjoint(rest):
            refuse_unknown(command, prefix_of(name))
            _refuse_doubled(ctx, command, rest)
        return name, command, rest

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. click takes any broken pipe for one of standard output, and ends without a word."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            if (trouble := trouble_with_stdout()) is not None:
                raise _unwritable(trouble) from error
            raise RuntimeError(f"a broken pipe: {error}") from error


def _refuse_doubled(ctx: click.Context, command: click.Command, arguments: list[str]) -> None:
    """Raise a usage error for an option of one value that is given twice: click would take the last one."""
    try:
        _, _, order = command.make_parser(ctx).parse_args(list(arguments))
    except click.UsageError:  # is said when the command parses them
        return
    for option in order:
        takes_one = isinstance(option, click.Option) and not (option.multiple or option.is_flag or option.count)
        if takes_one and order.count(option) > 1:
            raise click.UsageError(f"{option.opts[-1]} is given twice, but takes one value", ctx)


@click.group(
    cls=_LazyGroup,
    context_settings={
        "auto_envvar_prefix": "ZEROINF",
        "help_option_names": ["-h", "--help"],
        "max_content_width": 110,
        "show_default": True,
    },
)
@click.version_option(zeroinf.__version__, prog_name="zeroinf")
@click.option("--local_rank", "--local-rank", type=int, hidden=True, expose_value=False)  # set by launchers
def cli() -> None:
    """Throughput inference for language models that do not fit the GPU.

    Every option can also be set in the environment, by its command and flag: ZEROINF_RUN_BATCH_SIZE=16 is `zeroinf run
    --batch-size 16`. A flag comes before the environment. `zeroinf config show run` says what holds, and why.

    \b
    Exit codes: 0 done, 1 failure, 2 usage, 3 does not fit, 4 this machine lacks something,
    5 finished, but requests were refused or failed, 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP,
    138 SIGUSR1.
    """


def main() -> NoReturn:
    """Run the command line and end the process."""
    steady_streams()
    defer_dynamo()
    # DeepSpeed looks for ninja on PATH; it lies beside this Python, whose environment need not be active.
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    try:
        code: Any = cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        code = 130
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except ZeroinfError as error:
        code = _show(error)
    except Exception as error:  # a defect: others wait for this rank, so it must end here too
        if isinstance(error, OSError) and (trouble := trouble_with_stdout()) is not None:
            code = _show(_unwritable(trouble))
        else:
            traceback.print_exc()
            code = ZeroinfError.exit_code
    _leave(code if isinstance(code, int) else 0)


def _unwritable(error: OSError) -> OutputError:
    return OutputError(f"cannot write to standard output: {error.strerror}")


def _show(error: ZeroinfError) -> int:
    """Print the error and its hint; an error without words was told elsewhere."""
    if error.message:
        rank = os.environ.get("RANK", "0")
        click.echo(f"error: {f'rank {rank}: ' if rank != '0' else ''}{error.message}", err=True)
    if error.hint:
        click.echo(f"\nhint: {error.hint}", err=True)
    return error.exit_code


def _leave(code: int) -> NoReturn:
    """End the process. A rank that failed does not wait for collectives that others will never join."""
    if (trouble := trouble_with_stdout()) is not None and not code:
        code = _show(_unwritable(trouble))
    if code and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
