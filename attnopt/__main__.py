"""`python -m attnopt` is the command line."""

import sys

from attnopt.cli import main

if __name__ == "__main__":
    sys.exit(main())
