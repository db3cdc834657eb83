"""One part of a step, in a process of its own.

python docs/results/gpu/part.py [--shrunk] arkv|pytest|SCRIPT.py ARGUMENT...
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def main(arguments: list[str]) -> int:
    if arguments[0] == "--shrunk":
        from shrunk import shrink

        shrink()
        arguments = arguments[1:]
    program, *rest = arguments
    if program == "arkv":
        from arkv.cli import main as arkv

        return arkv(rest)
    if program == "pytest":
        import pytest

        return int(pytest.main(rest))
    sys.argv = [program, *rest]
    runpy.run_path(str(Path(__file__).parent / program), run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
