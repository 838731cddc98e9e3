"""The verb that looks at this machine as the planner would."""

import os
import subprocess
import sys
from typing import Annotated

import typer

from spotserve.cli.plan_inputs import DTYPES
from spotserve.cli.program import app
from spotserve.core.errors import ConfigError


@app.command()
def doctor(
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    threads: Annotated[int, typer.Option(min=1, help="Compute threads of a device.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Measure this machine as a worker does when it starts, and print the constants that the planner would use.

    Takes a few seconds. Three constants describe a device: operations per second, bytes per second, and what a decoder layer takes
    however little it computes. Beside each measurement stands what they say of it.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: expected {', '.join(DTYPES)}")
    command = [sys.executable, "-m", "spotserve.bench.device", "--dtype", dtype, "--threads", str(threads)]
    # A process of its own: the command line does not load torch, and threads are counted when it starts.
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    sys.exit(subprocess.run([*command, *(["--json"] if as_json else [])], env=environment, check=False).returncode)
