"""`zeroinf chat`: talk with a model in the terminal, or send it one message from a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any

import click

from zeroinf.cli.environment import option
from zeroinf.cli.keys import api_key, api_key_options
from zeroinf.cli.params import TextType, asked_of, flags, given, loading_options, options_of
from zeroinf.cli.waiting import importing
from zeroinf.errors import UsageError
from zeroinf.options.contradictions import prompt_room, refuse_early, refuse_idle
from zeroinf.options.options import (
    InputOptions,
    LaunchOptions,
    ModelOptions,
    RunOptions,
    SamplingOptions,
)

if TYPE_CHECKING:
    from zeroinf.serve.chats import Chat

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop")
_OF_CALLS = {"model", "server", "system", "api_key", "api_key_file", "max_new_tokens", *_SAMPLING}
"""What a server may be asked for; all else says how a model of this process runs."""
_NEW_TOKENS, _PROMPT_TOKENS = 512, 4096


@click.command(short_help="Talk with a model in the terminal.")
@click.argument("model", required=False)
@option("--server", help="Ask a server: its address, or the name of one that `zeroinf ps` lists. MODEL is one of its.")
@option("--system", type=TextType(), help="System prompt.")
@api_key_options("chat", "of --server")
@options_of(ModelOptions, only=("revision", "dtype", "trust_remote_code"))
@loading_options
@options_of(LaunchOptions, only=("num_gpus",))
@options_of(InputOptions, only=("max_model_len",))
@option(
    "--max-prompt-tokens",
    type=click.IntRange(min=1),
    help="Longest conversation: memory is planned for it. [default: 4096, or what the model's context holds]",
)
@option(
    "--max-new-tokens",
    "--max-tokens",
    type=click.IntRange(min=1),
    help="Most tokens of an answer. [default: 512, or the server's]",
)
@options_of(SamplingOptions, only=_SAMPLING)
@click.pass_context
def chat(ctx: click.Context, /, **asked: Any) -> None:
    """Talk with a model that need not fit the GPU, or with a server of OpenAI's API.

    MODEL is a hub id, a local folder, a .gguf file or `demo`. Answers appear as they are made; Ctrl-C stops an answer,
    Ctrl-D or /exit ends the chat, /help lists commands. Standard input that is no terminal is one message, and its
    answer is all that is written to standard output.

    \b
      zeroinf chat demo --system "Answer in one sentence."
      zeroinf chat --server http://127.0.0.1:8000
      echo "Why is the sky blue?" | zeroinf chat demo --temperature 0.7
    """
    from zeroinf.serve.chats import Conversation

    key, system = api_key(ctx, asked), asked.pop("system")
    settings = {name: asked.pop(name) for name in ("max_new_tokens", *_SAMPLING)}
    server = asked.pop("server")
    if server is None:
        if key is not None and given(ctx, "api_key_file"):
            raise UsageError("--api-key-file has no effect without --server", hint="drop it")
        opened = _loaded(ctx, asked, settings)
    else:
        opened = _remote(ctx, server, asked["model"], key, settings)
    with opened as made:
        conversation = Conversation(chat=made, system=system)
        if sys.stdin.isatty():
            from zeroinf.cli.chat_loop import talk

            talk(conversation)
        else:
            from zeroinf.cli.chat_loop import answer_once

            answer_once(conversation, sys.stdin.read())


@contextmanager
def _remote(
    ctx: click.Context, server: str, model: str | None, key: str | None, settings: dict[str, Any]
) -> Iterator[Chat]:
    from zeroinf.serve.chats import ServerChat, served_model
    from zeroinf.serve.http_client import ApiServer, key_of_environment
    from zeroinf.serve.named import the_server

    if unused := given(ctx, *(set(ctx.params) - _OF_CALLS)):
        raise UsageError(f"{flags(ctx, unused)} has no effect with --server, which runs the model", hint="drop it")
    if "/" in server or ":" in server:
        address = (server if "://" in server else f"http://{server}").rstrip("/").removesuffix("/v1")
    else:
        address = the_server(server).address
    api = ApiServer(name=f"server {server}", address=address, api_key=key or key_of_environment())
    body = {name: settings[name] for name in given(ctx, *settings)}
    if "max_new_tokens" in body:
        body["max_tokens"] = body.pop("max_new_tokens")
    yield ServerChat(server=api, model=served_model(api, model), settings=body)


@contextmanager
def _loaded(ctx: click.Context, asked: dict[str, Any], settings: dict[str, Any]) -> Iterator[Chat]:
    if asked["model"] is None:
        raise UsageError("no MODEL and no --server", hint="zeroinf chat demo")
    from zeroinf.generation.row import Sampling

    num_gpus, settings["max_new_tokens"] = asked.pop("num_gpus"), settings["max_new_tokens"] or _NEW_TOKENS
    prompt_tokens = prompt_room(asked.pop("max_prompt_tokens"), asked["max_model_len"], settings["max_new_tokens"])
    options = asked_of(ctx, RunOptions, asked, sampling=Sampling(**settings))
    refuse_idle(options)
    refuse_early(options)
    with importing():
        from rich.console import Console

        from zeroinf.cli.console import ConsoleObserver
        from zeroinf.model.anatomy import Anatomy
        from zeroinf.model.source import ModelSource
        from zeroinf.model.tokenizer import load_tokenizer
        from zeroinf.planner.workload import Lengths
        from zeroinf.runs.session import open_session
        from zeroinf.serve.chats import ModelChat
        from zeroinf.serve.lengths import planned_lengths

    def lengths(source: ModelSource, anatomy: Anatomy) -> Lengths:
        if getattr(load_tokenizer(source), "chat_template", None) is None:
            raise UsageError(f"{source.name} has no chat template", hint="zeroinf run --prompt completes plain text")
        return planned_lengths(
            anatomy,
            prompt_tokens=prompt_tokens,
            most_prompt_tokens=_PROMPT_TOKENS,
            new_tokens=options.sampling.max_new_tokens,
            logprobs=None,
            max_model_len=options.max_model_len,
        )

    observer = ConsoleObserver(Console(stderr=True, soft_wrap=True), quiet=not sys.stderr.isatty())
    with redirect_stdout(sys.stderr), observer:  # what libraries print is no answer
        session = open_session(options, lengths, 1, observer, num_gpus)
    with session:
        yield ModelChat(session=session, sampling=options.sampling, fixed_seed=bool(given(ctx, "seed")))
