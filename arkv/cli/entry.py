"""From the arguments of the process to its exit status, whatever happens on the way."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence

from arkv.cli.parser import parse
from arkv.errors import ArkvError, ArkvWarning, Terminated, is_out_of_memory

DEBUG = "ARKV_DEBUG"
"""Environment variable that, if it is set, shows the tracebacks of unexpected errors."""

LONGEST = 2000
"""Characters of an error: a prompt that somebody else's model quotes may have millions."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the name of the program; None for those of the process.

    Returns:
        0, 1 after an error that was told in one line or if nobody reads the output any more, 3 if a picture
        could not be drawn and the others are there, 130 after an interrupt, or 143 after SIGTERM to a run.

    Raises:
        SystemExit: after help or version (0), or if the arguments cannot be read (2).
    """
    typed = sys.argv[1:] if argv is None else [str(argument) for argument in argv]
    with _streams(), _warnings():
        doing = "reading the arguments"
        try:
            try:
                parsed = parse(typed)
                doing = f"running 'arkv {parsed.name}'"
                return parsed.run(parsed.options, shlex.join(["arkv", *typed])) or 0
            finally:
                _flush()
        except ArkvError as error:
            return _fail(str(error))
        except KeyboardInterrupt:
            _say("arkv: interrupted")
            return 130
        except Terminated:
            _say("arkv: terminated")
            return 143
        except BrokenPipeError:
            return 1
        except Exception as error:
            if is_out_of_memory(error):
                return _fail("out of memory; take a smaller --batch-size or a smaller ratio")
            if os.environ.get(DEBUG):
                raise
            return _fail(f"{_told(error)} while {doing}; {DEBUG}=1 shows where")


def _fail(told: str) -> int:
    _say(f"arkv: error: {' '.join(told.split())[:LONGEST]}")
    return 1


def _say(told: str) -> None:
    """Write to the standard error, as far as anything can be written there."""
    with contextlib.suppress(OSError, ValueError):
        print(told, file=sys.stderr, flush=True)


def _told(error: Exception) -> str:
    """What is known of an error that nobody expected."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}".removesuffix(": ")[:500]


@contextlib.contextmanager
def _streams() -> Iterator[None]:
    """Streams that take whatever is written: to nowhere where there is none, and any character."""
    before = sys.stdout, sys.stderr
    with contextlib.ExitStack() as opened:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is None or getattr(stream, "closed", False):
                nowhere = opened.enter_context(open(os.devnull, "w", encoding="utf-8"))
                setattr(sys, name, nowhere)
            elif getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before


@contextlib.contextmanager
def _warnings() -> Iterator[None]:
    """Warnings of arkv's own as a line each, without the place in its code that Python shows."""
    usual = warnings.formatwarning

    def told(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if issubclass(category, ArkvWarning):
            return f"arkv: warning: {' '.join(str(message).split())}\n"
        return usual(message, category, filename, lineno, line)

    warnings.formatwarning = told
    try:
        yield
    finally:
        warnings.formatwarning = usual


def _flush() -> None:
    """Write out what was printed while an error can still be told; the interpreter does it at its exit.

    Raises:
        BrokenPipeError: nobody reads it.
        ArkvError: it cannot be written.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        # What is left goes nowhere, or the exit would complain again.
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
        if isinstance(error, BrokenPipeError):
            raise
        raise ArkvError(f"cannot write to the standard output: {error.strerror}") from None
