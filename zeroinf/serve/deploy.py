"""Servers from Python, with the names that DeepSpeed-MII has: `deploy`, `client` and `terminate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from zeroinf.errors import InputError
from zeroinf.serve.http_client import API_KEY_VARIABLE, ApiServer, key_of_environment
from zeroinf.serve.named import NamedServer, start_in_background, stop_server, the_server

_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class DeployedAnswer:
    """A completion, with MII's names. Lengths in tokens."""

    generated_text: str
    prompt_length: int
    generated_length: int
    finish_reason: str


class DeployedClient:
    """Asks a server that `deploy` or `zeroinf serve --name` has started."""

    def __init__(self, server: NamedServer, api_key: str | None = None) -> None:
        """`api_key` None takes that of the environment, if there is one."""
        self.server = server
        key = key_of_environment() if api_key is None else api_key
        self._api = ApiServer(name=f"server {server.name}", address=server.address, api_key=key)

    def generate(
        self, prompts: str | Sequence[str], *, max_new_tokens: int | None = None, **settings: Any
    ) -> list[DeployedAnswer]:
        """An answer for each prompt, in order. `settings` are those of a request, as temperature or stop.

        Raises InputError for what the server refuses, ZeroinfError where it fails.
        """
        given = [prompts] if isinstance(prompts, str) else list(prompts)
        if max_new_tokens is not None:
            settings["max_new_tokens"] = max_new_tokens
        with ThreadPoolExecutor(max(1, min(_AT_ONCE, len(given)))) as pool:
            return list(pool.map(lambda prompt: self._answer({**settings, "prompt": prompt}), given))

    def query(self, request: Mapping[str, Any], **settings: Any) -> list[DeployedAnswer]:
        """Generate for `{"query": prompts}`, as MII's handles take it."""
        if set(request) != {"query"}:
            raise InputError(f"a request has the key query, not {', '.join(request)}", hint='{"query": ["..."]}')
        return self.generate(request["query"], **settings)

    def _answer(self, body: dict[str, Any]) -> DeployedAnswer:
        found = self._api.post("/v1/completions", body)
        choice, usage = found["choices"][0], found["usage"]
        return DeployedAnswer(
            choice["text"], usage["prompt_tokens"], usage["completion_tokens"], choice["finish_reason"]
        )


def deploy(model: str, *, name: str, api_key: str | None = None, **options: Any) -> DeployedClient:
    """Start a server of `model` in the background, and wait until it is ready.

    `options` are those of `zeroinf serve`: `engine="resident"`, `offload="cpu"`, `num_gpus=2`; without a `port` it
    takes one that is free. A server that ends instead of getting ready raises its last error, with
    its exit code, at once.
    """
    arguments = ["--model", model, "--quiet"]
    for key, value in {"port": 0, **options}.items():
        flag = key.replace("_", "-")
        for one in value if isinstance(value, list | tuple) else [value]:
            if one is None:
                continue
            arguments += [f"--{flag}" if one else f"--no-{flag}"] if isinstance(one, bool) else [f"--{flag}", str(one)]
    server = start_in_background(name, arguments, {} if api_key is None else {API_KEY_VARIABLE: api_key})
    return DeployedClient(server, api_key)


def client(name: str, *, api_key: str | None = None) -> DeployedClient:
    """A client of the server of that name on this machine. Raises UsageError where there is none."""
    return DeployedClient(the_server(name), api_key)


def terminate(name: str) -> None:
    """Let the server of that name end what is under way, and wait until it is gone. Raises UsageError where there is
    none."""
    stop_server(name)
