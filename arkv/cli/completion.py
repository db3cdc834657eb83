"""`arkv completion`."""

from __future__ import annotations

from typing import Literal

from arkv.cli.parser import COMPLETION, Command, Commands
from arkv.options import option, options


@options
class CompletionOptions:
    """Options of `arkv completion`."""

    shell: Literal["bash", "zsh", "fish"] = option(
        default="bash", metavar="SHELL", kind="positional", help="bash, zsh or fish"
    )


def run(given: CompletionOptions, typed: str) -> None:
    """Print the script."""
    from click.shell_completion import get_completion_class

    found = get_completion_class(given.shell)
    assert found is not None
    print(found(Commands(), {}, "arkv", COMPLETION).source())


COMMAND = Command(
    CompletionOptions,
    run,
    (
        'eval "$(arkv completion bash)"   # in ~/.bashrc',
        'eval "$(arkv completion zsh)"    # in ~/.zshrc',
        "arkv completion fish > ~/.config/fish/completions/arkv.fish",
    ),
)
