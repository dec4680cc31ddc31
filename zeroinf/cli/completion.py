"""Implements `zeroinf completion`: what a shell has to read so that Tab completes commands, options, choices and
models.
"""

from __future__ import annotations

import click

from zeroinf.cli.command import command
from zeroinf.cli.environment import prefix_of


@command(short_help="Let Tab complete in bash, zsh or fish.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what SHELL has to read so that Tab completes commands, options, choices and models.

    \b
      eval "$(zeroinf completion bash)"        # in ~/.bashrc
      eval "$(zeroinf completion zsh)"         # in ~/.zshrc, behind compinit
      zeroinf completion fish > ~/.config/fish/completions/zeroinf.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    root = click.get_current_context().find_root().command
    click.echo(kind(root, {}, "zeroinf", f"_{prefix_of('complete')}").source())
