"""From arguments to a command and its options: click reads, the classes of options say what there is.

Click and not one of the libraries on top of it that read types: those that help best need a newer Python than
this package, and they convert values by rules of their own, where a value has to mean the same in a job's
file, in Python and here.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import click
import click.shell_completion

import arkv
from arkv.cli.flags import OTHERS, flag_name, parameters_of, sections_of
from arkv.errors import UnknownNameError
from arkv.options import OptionError, read

COMPLETION = "_ARKV_COMPLETE"
"""Environment variable by which a shell asks for completions."""

COMMANDS = {
    "demo": "draw eight prompts with a full cache and two small ones, side by side",
    "generate": "draw pictures from prompts",
    "run": "draw the pictures of a job: a file of prompts, on one GPU, all of a machine, or a cluster",
    "sheet": "put the pictures of a folder or a job on one contact sheet",
    "policies": "list the cache policies and their parameters, or show one",
    "models": "list the models, or show one",
    "estimate": "say how much memory a model, a policy and a batch will take, or what fits into some",
    "bench": "measure speed and memory of policies on this machine",
    "eval": "score the pictures of policies, and what they lose of the full cache's attention",
    "inspect": "draw what a cache holds: the resident tokens of chosen heads at chosen lines, and their ages",
    "profile": "measure how much attention of every head goes beyond the neighbourhood, for some policies",
    "completion": "print a script that lets a shell complete commands, flags and names",
}


@dataclasses.dataclass(frozen=True)
class Command:
    """A command of `arkv`.

    Attributes:
        options: its class of options.
        run: does it, given the options and the command as it was typed; returns the exit status, or None.
        examples: shown in its help.
    """

    options: type
    run: Callable[[Any, str], int | None]
    examples: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Parsed:
    """A command that was asked for, and its options."""

    name: str
    run: Callable[[Any, str], int | None]
    options: Any


def parse(argv: Sequence[str]) -> Parsed:
    """Read arguments.

    Raises:
        SystemExit: after help or version (0), or if the arguments cannot be read (2): a few lines say why.
        ArkvError: a number has the right type and no model could draw with it.
    """
    group = Commands()
    if asked := os.environ.get(COMPLETION):
        sys.exit(click.shell_completion.shell_complete(group, {}, "arkv", COMPLETION, asked))
    try:
        with group.make_context("arkv", list(argv)) as context:
            return group.invoke(context)
    except click.exceptions.Exit as stop:
        raise SystemExit(stop.exit_code) from None
    except click.UsageError as error:
        name = "" if error.ctx is None or error.ctx.parent is None else f" {error.ctx.info_name}"
        what = "[FLAGS]" if name else "COMMAND [FLAGS]"
        told = " ".join(error.format_message().split())
        if told[1:2].islower():
            told = told[0].lower() + told[1:].removesuffix(".")
        print(f"usage: arkv{name} {what}", file=sys.stderr)
        print(f"arkv: error: {told}", file=sys.stderr)
        print(f"'arkv{name} --help' shows what there is", file=sys.stderr)
        raise SystemExit(2) from None


def load_command(name: str) -> Command:
    """A command by its name; its module imports nothing heavy."""
    command: Command = import_module(f"arkv.cli.{name}").COMMAND
    return command


class Commands(click.Group):
    """All commands; each is imported when it is asked for."""

    def __init__(self) -> None:
        version = click.Option(
            ["--version"], is_flag=True, is_eager=True, expose_value=False, callback=_print_version
        )
        version.help = "Show the version."
        super().__init__("arkv", params=[version], no_args_is_help=False)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Their names."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """One of them, or None."""
        return _Command(cmd_name, load_command(cmd_name)) if cmd_name in COMMANDS else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with what might have been meant."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-") and not ctx.resilient_parsing:
            ctx.fail(str(UnknownNameError("command", args[0], COMMANDS)))
        return super().resolve_command(ctx, args)

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Commands with a line each."""
        formatter.write_text("Autoregressive image generation with a small part of the KV cache.")
        formatter.write_paragraph()
        formatter.write_text("usage: arkv COMMAND [FLAGS]")
        with formatter.section(_heading("Commands")):
            formatter.write_dl(list(COMMANDS.items()), col_max=16)
        _write_examples(formatter, ("arkv demo --out demo.png",))
        formatter.write_paragraph()
        formatter.write_text("'arkv COMMAND --help' shows the flags of a command.")


class _Command(click.Command):
    """One command: flags from its class of options."""

    def __init__(self, name: str, command: Command) -> None:
        super().__init__(name, callback=self._parsed, params=parameters_of(command.options))
        self.command = command

    def _parsed(self, **given: Any) -> Parsed:
        assert self.name is not None
        values = {name: value for name, value in given.items() if value not in (None, (), False)}
        options = self.command.options

        def named(field: str) -> str:
            return flag_name(options, field)

        try:
            made: Any = read(options, values, where=f"arkv {self.name}", texts=True, named=named)
        except OptionError as error:
            drawing = [*sections_of(options).get("Sampling", []), "seed"]
            if error.out_of_range and error.option in drawing:
                raise  # no model can draw with it; that this one cannot is known later, and told likewise
            raise click.UsageError(_flags_first(error), click.get_current_context()) from None
        return Parsed(self.name, self.command.run, made)

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """What it does, its flags in groups, and examples."""
        summary = COMMANDS[str(self.name)]
        formatter.write_text(summary[0].upper() + summary[1:] + ".")
        formatter.write_paragraph()
        positional = [p.make_metavar(ctx) for p in self.params if isinstance(p, click.Argument)]
        formatter.write_text(" ".join([f"usage: arkv {self.name}", *positional, "[FLAGS]"]))
        records = {str(p.name): p.get_help_record(ctx) for p in self.params}
        sections = sections_of(self.command.options)
        records["help"] = ("--help", "show this")
        sections.setdefault(OTHERS, []).append("help")
        for heading, names in sections.items():
            with formatter.section(_heading(heading)):
                formatter.write_dl([r for n in names if (r := records[n]) is not None], col_max=26)
        _write_examples(formatter, self.command.examples)


def _flags_first(error: OptionError) -> str:
    """A lack as somebody types it."""
    return str(error).replace(" lacks ", " needs ", 1)


def _heading(text: str) -> str:
    return click.style(text, bold=True)


def _write_examples(formatter: click.HelpFormatter, examples: Sequence[str]) -> None:
    """As they stand: they are there to be copied."""
    formatter.write_paragraph()
    formatter.write(_heading("Example:" if len(examples) == 1 else "Examples:").lower() + "\n")
    for example in examples:
        formatter.write(f"  {example}\n")


def _print_version(context: click.Context, parameter: click.Parameter, asked: bool) -> None:
    if asked and not context.resilient_parsing:
        print(f"arkv {arkv.__version__}")
        context.exit()
