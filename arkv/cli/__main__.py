"""`python -m arkv.cli`."""

from __future__ import annotations

import sys

from arkv.cli.entry import main

sys.exit(main())
