"""Entry point. Importing a module of verbs adds them to the program."""

import sys

from rich.text import Text

from spotserve.cli import advise, benches, doctor, local, operate, plan, replays, runs, traces
from spotserve.cli.program import app, errors
from spotserve.core.errors import SpotServeError

__all__ = ["advise", "app", "benches", "doctor", "local", "main", "operate", "plan", "replays", "runs", "traces"]


def main() -> None:
    """Entry point: errors that are the world's doing become one line and exit code 1."""
    try:
        app()
    except SpotServeError as error:
        errors.print(Text.assemble(("error:", "red"), f" {error}"), highlight=False, soft_wrap=True)
        sys.exit(1)
