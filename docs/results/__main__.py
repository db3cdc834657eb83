"""`python docs/results`: see `pages`."""

import sys

from pages import main

if __name__ == "__main__":
    sys.exit(main())
