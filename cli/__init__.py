"""The command line: one file per subcommand."""

from attnopt.cli._errors import Exit as Exit
from attnopt.cli._main import main as main
