"""`zeroinf serve`: OpenAI's API over HTTP, in front of a model whose weights do not live on the GPU."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from zeroinf.cli.command import command
from zeroinf.cli.environment import option
from zeroinf.cli.keys import api_key, api_key_options
from zeroinf.cli.params import FiniteFloat, SizeType, asked_of, loading_options, options_of
from zeroinf.cli.waiting import importing
from zeroinf.errors import EnvironmentProblem, UsageError
from zeroinf.options.contradictions import prompt_room, refuse_early, refuse_idle
from zeroinf.options.options import (
    InputOptions,
    LaunchOptions,
    ModelOptions,
    RandomWeightsOptions,
    RunOptions,
)
from zeroinf.serve.settings import Settings
from zeroinf.sizes import DEFAULT_NEW_TOKENS

_SETTINGS = ("host", "port", "allowed_hosts", "max_queue", "state", "max_state_bytes", "max_file_bytes")


@command(short_help="Serve OpenAI's API over HTTP.")
@options_of(ModelOptions)
@options_of(RandomWeightsOptions)
@loading_options
@options_of(LaunchOptions, only=("num_gpus",))
@options_of(InputOptions, only=("max_model_len",))
@option(
    "--max-prompt-tokens",
    type=click.IntRange(min=1),
    help="Longest prompt that is taken: memory is planned for it. [default: 2048, or what the model's context holds]",
)
@option(
    "--max-new-tokens",
    "--max-tokens",
    type=click.IntRange(min=1),
    default=DEFAULT_NEW_TOKENS,
    help="Most tokens of a completion, and of those that do not say how many.",
)
@option(
    "--prompt-logprobs",
    section="server",
    is_flag=True,
    help="Plan memory for log-probabilities of prompts (echo with logprobs). Prompts run whole and forwards are padded "
    "then, which is slower.",
)
@option("--host", default="127.0.0.1", help="Address to listen on; any but this machine's own needs an API key.")
@option("--port", type=click.IntRange(0, 65535), default=8000, help="Port to listen on; 0 takes any that is free.")
@api_key_options("serve", "that clients must send")
@option(
    "--allowed-host",
    "allowed_hosts",
    section="server",
    multiple=True,
    help="Host header that is answered, such as llm.example.org; may be given many times. [default: on loopback its "
    "names, elsewhere any]",
)
@option(
    "--state",
    section="server",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of files and batches, which survive the server. [default: there are none]",
)
@option(
    "--max-state",
    "max_state_bytes",
    section="server",
    type=SizeType(),
    default="64GiB",
    help="The most that clients' files may take in --state.",
)
@option(
    "--max-file",
    "max_file_bytes",
    section="server",
    type=SizeType(),
    default="512MiB",
    help="The largest file that a client may upload.",
)
@option("--served-model-name", section="server", help="What clients call the model. [default: --model]")
@option(
    "--max-queue",
    section="server",
    type=click.IntRange(min=1),
    default=256,
    help="Interactive completions under way at once; more are answered 429.",
)
@option(
    "--heartbeat-seconds",
    section="server",
    type=FiniteFloat(min=0.01),
    default=1.0,
    help="Longest silence towards a client that waits, so that none with a short time-out asks twice.",
)
@option(
    "--drain-seconds",
    section="server",
    type=FiniteFloat(min=0),
    default=600.0,
    help="Longest wait for answers under way when the server is stopped.",
)
@option("--name", help="Name by which `zeroinf ps`, `zeroinf stop` and `zeroinf.client` find the server.")
@option("--detach", is_flag=True, help="Run in the background, and return once it is ready. With --name.")
@option("-q", "--quiet", is_flag=True, help="No plan and no progress; errors and notes stay.")
@click.pass_context
def serve(ctx: click.Context, /, **asked: Any) -> None:
    """Serve OpenAI's API over HTTP with a model that need not fit the GPU.

    Chat and text completions, streamed or whole, and batches that survive with --state. It listens at once; /health
    answers 503 until weights are loaded.
    SIGTERM and Ctrl-C let what is under way come to its end; a second one does not wait.

    \b
      zeroinf serve --model HuggingFaceTB/SmolLM2-135M-Instruct
      curl http://127.0.0.1:8000/v1/completions \\
        -H 'Content-Type: application/json' \\
        -d '{"prompt": "The capital of France is", "max_tokens": 8}'
    """
    _refuse_launcher()
    name, detach = asked.pop("name"), asked.pop("detach")
    if detach:
        _detach(name)
        return
    key = api_key(ctx, asked)
    settings = Settings(
        model_name=asked.pop("served_model_name") or asked["model"],
        api_key=key,
        heartbeat_s=asked.pop("heartbeat_seconds"),
        drain_s=asked.pop("drain_seconds"),
        **{name: asked.pop(name) for name in _SETTINGS},
    )
    _serve(ctx, settings, name, asked)


def _serve(ctx: click.Context, settings: Settings, name: str | None, asked: dict[str, Any]) -> None:
    from zeroinf.generation.row import Sampling

    quiet, num_gpus = asked.pop("quiet"), asked.pop("num_gpus")
    sampling, scores_prompts = Sampling(max_new_tokens=asked.pop("max_new_tokens")), asked.pop("prompt_logprobs")
    prompt_tokens = prompt_room(asked.pop("max_prompt_tokens"), asked["max_model_len"], sampling.max_new_tokens)
    options = asked_of(ctx, RunOptions, asked, sampling=sampling)
    refuse_idle(options)
    refuse_early(options)
    with importing(quiet=quiet):
        from rich.console import Console

        from zeroinf.cli.console import ConsoleObserver

        try:
            from zeroinf.serve.server import run_server
        except ImportError as error:
            raise _lacking(error) from error

    console = Console(stderr=True, soft_wrap=True)
    with ConsoleObserver(console, quiet=quiet) as observer:
        run_server(
            settings,
            options,
            prompt_tokens,
            scores_prompts,
            num_gpus,
            observer,
            name,
            listening=lambda address: click.echo(f"listening on {address}", err=True),
            ready=lambda address: click.echo(f"ready: {settings.model_name} at {address}/v1", err=True),
        )


def _detach(name: str | None) -> None:
    if name is None:
        raise UsageError("--detach without --name", hint="add --name, by which it is found and stopped")
    from zeroinf.serve.named import start_in_background

    at = sys.argv.index("serve")
    words = iter(sys.argv[at + 1 :])
    rest = [word for word in words if word != "--detach" and not word.startswith("--name=")]
    if "--name" in rest:
        del rest[rest.index("--name") : rest.index("--name") + 2]
    server = start_in_background(name, rest)
    click.echo(f"ready: {server.model} at {server.address}/v1", err=True)


def _refuse_launcher() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("zeroinf serve starts its own ranks", hint="start it without a launcher, with --num-gpus N")


def _lacking(error: ImportError) -> EnvironmentProblem:
    return EnvironmentProblem(f"zeroinf serve needs {error.name}", hint="pip install 'zeroinf[serve]'")
