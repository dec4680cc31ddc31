"""`zeroinf chat`: histories, servers and models, pipes and terminals."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner
from forked import Forked
from http_serving import MODEL, server
from observers import Deaf

from zeroinf.cli.main import cli
from zeroinf.errors import InputError, ZeroinfError
from zeroinf.generation.row import Sampling
from zeroinf.options.options import RunOptions
from zeroinf.planner.workload import Lengths
from zeroinf.runs.session import open_session
from zeroinf.serve.chats import ChatPiece, Conversation, Message, ModelChat
from zeroinf.serve.gateway import Gateway
from zeroinf.serve.http_client import PromptTooLongError


class Parrot:
    """Answers with the number of messages, and has room for so many."""

    def __init__(self, most: int = 99) -> None:
        self.most, self.heard = most, list[Sequence[Message]]()

    def answer(self, messages: Sequence[Message]) -> Generator[ChatPiece]:
        if len(messages) > self.most:
            raise PromptTooLongError("too long")
        if messages[-1]["content"] == "fail":
            raise ZeroinfError("failed")
        self.heard.append(list(messages))
        yield ChatPiece("I heard ")
        yield ChatPiece(f"{len(messages)}", "stop")


def said(conversation: Conversation, text: str) -> str:
    return "".join(piece.text for piece in conversation.say(text))


def test_a_conversation_remembers_and_forgets() -> None:
    parrot = Parrot(most=4)
    conversation = Conversation(chat=parrot, system="be brief")
    assert said(conversation, "one") == "I heard 2"
    assert said(conversation, "two") == "I heard 4"
    assert [one["role"] for one in parrot.heard[-1]] == ["system", "user", "assistant", "user"]
    assert said(conversation, "three") == "I heard 4"
    assert (conversation.left_out, parrot.heard[-1][1]["content"]) == (2, "two")
    before = list(conversation.messages)
    with pytest.raises(ZeroinfError, match="failed"):
        said(conversation, "fail")
    assert conversation.messages[-2:] == before[-2:], "what got no answer is not remembered"
    with closing(conversation.say("four")) as pieces:
        next(pieces)
    assert conversation.messages[-1] == {"role": "assistant", "content": "I heard "}, "broken off"
    assert conversation.take_back() == "four"
    conversation.clear()
    assert conversation.take_back() is None
    parrot.most = 1
    with pytest.raises(PromptTooLongError):
        said(conversation, "a single one that is too long")
    assert conversation.messages == []


@pytest.fixture(scope="module")
def folder(small_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a chat template."""
    own = tmp_path_factory.mktemp("chatty") / "model"
    shutil.copytree(small_checkpoint("llama"), own)
    (own / "chat_template.jinja").write_text("{% for m in messages %}{{ m['role'][0] + m['content'] }}{% endfor %}")
    return own


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[tuple[httpx.Client, Gateway]]:
    with server(folder, slow_s=0.02) as found:
        yield found


def test_a_pipe_is_one_message_to_a_server_or_a_model(folder: Path, served: tuple[httpx.Client, Gateway]) -> None:
    client, _ = served
    asked = ["--max-new-tokens", "6", "--system", "x"]
    answer = CliRunner().invoke(cli, ["chat", "--server", f"{client.base_url}/v1/", *asked], input="hello\n")
    assert answer.exit_code == 0, answer.output
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": "hello"}]
    body = client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 6}).json()
    assert answer.stdout == body["choices"][0]["message"]["content"] + "\n"
    command = ["zeroinf", "chat", str(folder), "--max-prompt-tokens", "24", *asked]
    alone = Forked(command, os.environ, stdin=True, own_group=False)
    out, err = alone.communicate("hello\n", timeout=60)
    assert (alone.wait(), out) == (0, answer.stdout), err


@pytest.mark.parametrize(
    ("words", "text", "why"),
    [
        ([], "x", "no MODEL and no --server"),
        (["--server", "none-of-that-name"], "x", "no server named"),
        (["--server", "127.0.0.1:9"], "x", "does not answer"),
        (["--server", "{}", "other"], "x", "has no model 'other'"),
        (["--server", "{}", "--engine", "zero"], "x", "--engine has no effect with --server"),
        (["--server", "{}"], " \n", "holds no message"),
        (["--server", "{}"], "x" * 99, "--max-prompt-tokens"),
        (["--server", "{}", "--api-key", "k"], "x", "on the command line"),
    ],
)
def test_mistakes_are_told(served: tuple[httpx.Client, Gateway], words: list[str], text: str, why: str) -> None:
    address = str(served[0].base_url)
    answer = CliRunner().invoke(cli, ["chat", *(word.format(address) for word in words)], input=text)
    assert isinstance(answer.exception, ZeroinfError) and why in answer.exception.message


def test_a_chat_with_a_server_loads_nothing_that_is_heavy() -> None:
    script = (
        "import sys, zeroinf.cli.main as main\nsys.argv[1:] = ['chat', '--server', 'http://127.0.0.1:9']\n"
        "try:\n    main.main()\nfinally:\n    print(*{'torch', 'transformers', 'numpy', 'rich'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", script], input="x", capture_output=True, text=True)
    assert "does not answer" in done.stderr
    assert done.stdout == "\n"


def test_a_model_of_this_process_stops_within_a_pass(folder: Path) -> None:
    options = RunOptions(model=str(folder), sampling=Sampling(max_new_tokens=40, ignore_eos=True))
    with open_session(options, Lengths(prompt_tokens=64, new_tokens=40, sampled=True), 1, Deaf()) as session:
        chat = ModelChat(session=session, sampling=options.sampling, fixed_seed=False)
        conversation = Conversation(chat=chat)
        free = session.model.scheduler.free_rows
        with closing(conversation.say("tell me")) as pieces:
            first = next(pieces)
        until = time.monotonic() + 60
        while session.model.scheduler.free_rows < free:
            assert time.monotonic() < until
            time.sleep(0.01)
        assert conversation.messages[-1]["content"] == first.text
        conversation.clear()
        whole = said(conversation, "tell me")
        assert whole.startswith(first.text) and len(whole) > len(first.text)
        said(conversation, "x" * 20)
        assert conversation.left_out == 2, "it had no room for the first ones"
        with pytest.raises(InputError, match="the conversation has"):
            said(conversation, "x" * 99)


class Terminal:
    """`zeroinf` in a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.master, inner = pty.openpty()
        take = (
            "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
            "os.execv(sys.executable, [sys.executable, '-m', 'zeroinf', *sys.argv[1:]])"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", take, *arguments],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            start_new_session=True,
            env={**os.environ, "TERM": "dumb"},
        )
        os.close(inner)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def until(self, pattern: str, pressing: str = "") -> str:
        """What is shown from now on, until it has `pattern` in it. `pressing` is typed while nothing is shown."""
        seen = ""
        self.type(pressing)
        while not re.search(pattern, seen):
            if pressing and not select.select([self.master], [], [], 2)[0]:
                self.type(pressing)
            else:
                seen += os.read(self.master, 4096).decode(errors="replace")
        self.shown += seen
        return seen


@contextmanager
def terminal(*arguments: str) -> Iterator[Terminal]:
    made = Terminal(*arguments)
    try:
        yield made
    finally:
        if made.process.poll() is None:
            made.process.send_signal(signal.SIGKILL)
        made.process.wait()
        os.close(made.master)


def test_a_terminal_stops_answers_and_takes_commands(
    folder: Path, served: tuple[httpx.Client, Gateway], tmp_path: Path
) -> None:
    client, gateway = served
    with terminal("chat", "--server", str(client.base_url), MODEL) as screen:
        screen.until("> ")
        began = gateway.metrics.tokens
        screen.type("hi\n")
        screen.until("> $")
        assert gateway.metrics.tokens > began
        screen.type("/system s\n/retry\n")
        screen.until("system prompt: s")
        screen.until("> $")
        screen.type("/nothing\n")
        screen.until("no command /nothing")
        saved = tmp_path / "chat.jsonl"
        screen.type(f"/save {saved}\n")
        screen.until("saved 2 messages")
        assert [one["role"] for one in json.loads(saved.read_text())["messages"]] == ["system", "user", "assistant"]
        screen.type("/clear\n")
        screen.until("> $")
        model = gateway.service.model
        slowed, forward = 0.5, model.engine.forward

        def slower(*asked: object, **named: object) -> object:
            time.sleep(slowed)
            return forward(*asked, **named)

        model.engine.forward = slower  # type: ignore[method-assign]
        try:
            screen.type("again\n")
            while not gateway.under_way:
                time.sleep(0.01)
            screen.type("\x03")
            screen.until(r"\[stopped\][\s\S]*> $")  # the prompt that the next Ctrl-C finds
            while gateway.under_way:
                time.sleep(0.01)
        finally:
            model.engine.forward = forward  # type: ignore[method-assign]
        # The interpreter learns of a signal between its prompt and its waiting for a key only with the next one.
        screen.until("> $", pressing="\x03")
        screen.type("/exit\n")
        assert screen.process.wait(60) == 0
