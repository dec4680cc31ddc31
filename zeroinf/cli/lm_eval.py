"""`zeroinf lm-eval`: lm-evaluation-harness's own command line, with zeroinf's model in its registry."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from zeroinf.cli.waiting import importing
from zeroinf.errors import EnvironmentProblem

_OTHER_COMMANDS = frozenset({"ls", "validate", "-h", "--help"})
_NAME_A_MODEL = ("--model", "-M", "--config", "-C")


@click.command(
    name="lm-eval",
    short_help="Run lm-evaluation-harness's tasks.",
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def lm_eval(arguments: Sequence[str]) -> None:
    """Run tasks of lm-evaluation-harness: its own command line, all of its options, with zeroinf as the model.

    --model_args has the model (pretrained=...) and keywords of zeroinf.pipeline: offload, wire, gpu_memory, num_gpus.

    \b
      zeroinf lm-eval --model_args pretrained=demo,dtype=float32 --tasks arc_easy
      zeroinf lm-eval run --help        # the harness's options
      zeroinf lm-eval ls tasks
    """
    with importing():
        try:
            from lm_eval.__main__ import cli_evaluate
        except ImportError as error:
            raise EnvironmentProblem(
                f"lm-evaluation-harness cannot be imported: {error}", hint="pip install 'zeroinf[eval]'"
            ) from error
        import zeroinf.lm_eval  # noqa: F401 - registers the model

    sys.argv = ["zeroinf lm-eval", *with_model(arguments)]
    cli_evaluate()


def with_model(arguments: Sequence[str]) -> list[str]:
    """`arguments` for the harness, of which `zeroinf` is the model unless they name one."""
    if not arguments or arguments[0] in _OTHER_COMMANDS:
        return list(arguments)
    rest = list(arguments[1:] if arguments[0] == "run" else arguments)
    named = any(one.partition("=")[0] in _NAME_A_MODEL for one in rest)
    asks_help = not rest or not {"-h", "--help"}.isdisjoint(rest)
    return ["run", *(() if named or asks_help else ("--model", "zeroinf")), *rest]
