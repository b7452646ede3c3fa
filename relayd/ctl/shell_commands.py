"""The command for the shell: `relayctl completion`."""

from __future__ import annotations

from typing import Any

import click

SHELLS = ("bash", "zsh", "fish")


@click.command(short_help="Print a script for your shell's completion.")
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print a script that completes relayctl's commands in your shell.

    \b
    bash:  eval "$(relayctl completion bash)"                 in ~/.bashrc
    zsh:   eval "$(relayctl completion zsh)"                  in ~/.zshrc
    fish:  relayctl completion fish > ~/.config/fish/completions/relayctl.fish
    """
    from click.shell_completion import get_completion_class

    kind: Any = get_completion_class(shell)
    command = ctx.find_root().command
    click.echo(kind(command, {}, "relayctl", "_RELAYCTL_COMPLETE").source())
