"""The command `arkv`: a file a command.

The only room that prints. Results go to the standard output, progress and errors to the standard error.
Nothing heavy is imported before a command needs it, so that `arkv --help` answers at once.
"""

from __future__ import annotations

from arkv.cli.entry import main as main
