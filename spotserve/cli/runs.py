"""The verb that shows the system at work."""

from pathlib import Path
from typing import Annotated

import typer

from spotserve.cli.local import own_cluster
from spotserve.cli.program import app, console
from spotserve.demo.run import run_demo


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("runs/demo"),
    instances: Annotated[int, typer.Option(help="Instances of the local cluster.")] = 4,
    port: Annotated[int, typer.Option(help="Port of its gateway; 0: any free one.")] = 0,
) -> None:
    """Show it: a local cluster under real load, first left alone, then losing its machines to a trace.

    Ends with exit code 0 only when no request was lost and no token altered.
    """
    with own_cluster(port, instances) as (url, secret):
        exit_code = run_demo(url, secret, out, console)
    raise typer.Exit(exit_code)
