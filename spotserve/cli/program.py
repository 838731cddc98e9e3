"""The program itself: its name, its two consoles, and what becomes of errors. Verbs are added by the modules beside this one."""

import typer
from rich.console import Console

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Serve large language models on spot instances: one URL and unbroken token streams while machines come and go.",
)
console = Console()
errors = Console(stderr=True)
