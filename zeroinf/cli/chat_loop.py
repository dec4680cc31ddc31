"""The terminal's side of `zeroinf chat`: reads messages and commands, and shows answers as they come."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from pathlib import Path

import click

from zeroinf.errors import InputError, ZeroinfError
from zeroinf.serve.chats import Conversation

_COMMANDS = {
    "/help": "list commands",
    "/clear": "begin anew; the system prompt stays",
    "/system TEXT": "set the system prompt; without TEXT, show it",
    "/retry": "answer the last message again",
    "/save FILE": "write the conversation, as a line of input of `zeroinf run`",
    "/exit": "leave, as Ctrl-D does",
}
_PROMPT, _MORE = "> ", ". "


def talk(conversation: Conversation) -> None:
    """Read messages from the terminal until its end, and answer each."""
    import readline  # noqa: F401  # makes `input` edit lines and remember them

    _note("Ctrl-C stops an answer, Ctrl-D ends the chat, /help lists commands; a line that ends in \\ goes on")
    while True:
        try:
            text = _read()
        except KeyboardInterrupt:
            click.echo(err=True)
            continue
        except EOFError:
            click.echo(err=True)
            return
        if text.startswith("/"):
            if _command(conversation, text):
                return
        elif text.strip():
            _say(conversation, text)


def answer_once(conversation: Conversation, text: str) -> None:
    """Write the answer to one message to standard output. Raises InputError where there is no message."""
    if not text.strip():
        raise InputError("standard input holds no message", hint="type into a terminal, or pipe a text")
    with closing(conversation.say(text.rstrip("\n"))) as pieces:
        for piece in pieces:
            click.echo(piece.text, nl=False)
    click.echo()


def _read() -> str:
    """A message of one line, or of several. Raises EOFError at the end."""
    lines: list[str] = []
    while True:
        line = _read_line(_MORE if lines else _PROMPT)
        if not line.endswith("\\"):
            return "\n".join([*lines, line])
        lines.append(line[:-1])


def _read_line(prompt: str) -> str:
    if sys.stdout.isatty():
        return input(prompt)
    click.echo(prompt, nl=False, err=True)  # standard output is for answers
    return input()


def _say(conversation: Conversation, text: str) -> None:
    left_out, reason = conversation.left_out, None
    try:
        with closing(conversation.say(text)) as pieces:
            for piece in pieces:
                click.echo(_shown(piece.text), nl=False)
                reason = piece.finish_reason or reason
    except KeyboardInterrupt:
        reason = "stopped"
    except ZeroinfError as error:
        _note(f"error: {error.message}" + (f"\nhint: {error.hint}" if error.hint else ""))
        return
    click.echo()
    if reason == "stopped":
        _note("[stopped]")
    elif reason == "length":
        _note("[the answer reached --max-new-tokens]")
    if conversation.left_out > left_out:
        _note("[the conversation is long: its oldest messages were left out]")


def _command(conversation: Conversation, text: str) -> bool:
    """Carry out a command; whether the chat is over."""
    name, _, rest = text.strip().partition(" ")
    rest = rest.strip()
    match name:
        case "/exit" | "/quit" | "/bye":
            return True
        case "/help":
            for command, does in _COMMANDS.items():
                _note(f"{command:<14}{does}")
        case "/clear":
            conversation.clear()
        case "/system":
            conversation.system = rest or conversation.system
            _note(f"system prompt: {conversation.system or 'none'}")
        case "/retry":
            if (last := conversation.take_back()) is None:
                _note("nothing to answer again")
            else:
                _say(conversation, last)
        case "/save":
            _save(conversation, rest)
        case _:
            _note(f"no command {name}: /help lists them")
    return False


def _save(conversation: Conversation, file: str) -> None:
    if not file:
        _note("/save FILE: which file?")
        return
    system = [] if conversation.system is None else [{"role": "system", "content": conversation.system}]
    line = json.dumps({"messages": [*system, *conversation.messages]}, ensure_ascii=False)
    try:
        with Path(file).expanduser().open("x", encoding="utf-8") as opened:
            opened.write(f"{line}\n")
    except OSError as error:
        _note(f"cannot write {file}: {error.strerror}")
    else:
        _note(f"saved {len(conversation.messages)} messages in {file}")


def _shown(text: str) -> str:
    """`text` without control characters, by which an answer could move the cursor or retitle the terminal."""
    if not sys.stdout.isatty():
        return text
    return "".join(one if one in "\n\t" or not (ord(one) < 32 or 127 <= ord(one) < 160) else "\ufffd" for one in text)


def _note(text: str) -> None:
    click.echo(text, err=True)
