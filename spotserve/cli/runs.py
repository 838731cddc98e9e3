"""Verbs that run something to its end: the demonstration, replays."""

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from spotserve.cli.local import own_cluster
from spotserve.cli.program import app, console
from spotserve.cli.reach import secret_of, system_url
from spotserve.core.errors import ConfigError
from spotserve.demo.run import run_demo
from spotserve.replay.run import ReplayOptions, run_replay
from spotserve.replay.timeline import Scaling


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


@app.command()
def replay(
    requests: Annotated[Path, typer.Option(help="Trace of requests: when, how long, how much.")],
    out: Annotated[Path, typer.Option(help="Folder of the report.")],
    live: Annotated[bool, typer.Option("--live", help="Against a running system (the only form of this version).")] = False,
    capacity: Annotated[
        Path | None, typer.Option(help="Trace of machines that come and go; none: the fleet is left alone.")
    ] = None,
    url: Annotated[
        str | None,
        typer.Option("--url", envvar="SPOTSERVE_URL", callback=system_url, help="A running system; none: one is started."),
    ] = None,
    instances: Annotated[int, typer.Option(help="Instances of a system that is started for this.")] = 4,
    grace: Annotated[float, typer.Option(help="Seconds of notice (no trace holds it).")] = 30.0,
    notice_share: Annotated[float, typer.Option(help="Share of losses that come with a notice.")] = 1.0,
    time_scale: Annotated[float, typer.Option(help="Seconds of trace per second of replay: 2 is twice as fast.")] = 1.0,
    rate_scale: Annotated[float, typer.Option(help="Requests per request of the trace.")] = 1.0,
    start: Annotated[float, typer.Option(help="Seconds of the trace to leave out at its beginning.")] = 0.0,
    duration: Annotated[float | None, typer.Option(help="Seconds of the trace to play; none: all.")] = None,
    seed: Annotated[int, typer.Option(help="Chooses victims, notices and prompts.")] = 0,
    dtype: Annotated[str, typer.Option(help="What the system computes in: says how near a near tie is.")] = "float32",
    api_key: Annotated[str | None, typer.Option(envvar="SPOTSERVE_API_KEY", help="Key of the gateway, if it wants one.")] = None,
    reference: Annotated[bool, typer.Option(help="Answer every request once more, undisturbed, and compare the tokens.")] = True,
) -> None:
    """Play traces of machines and requests against a running system, and report what clients saw.

    Example:

        spotserve replay --live --capacity traces/demo-capacity.csv --requests traces/demo-requests.csv --grace 3 --out runs/mine
    """
    if not live:
        raise ConfigError("this version replays against a running system only: add --live")
    scaling = Scaling(
        start_s=start,
        duration_s=duration,
        time_scale=time_scale,
        rate_scale=rate_scale,
        grace_s=grace,
        notice_share=notice_share,
        seed=seed,
    )
    with contextlib.ExitStack() as at_end:
        if url is None:
            url, secret = at_end.enter_context(own_cluster(0, instances))
        else:
            secret = secret_of(url)
        options = ReplayOptions(
            url=url,
            secret=secret,
            out=out,
            requests=requests,
            capacity=capacity,
            scaling=scaling,
            reference=reference,
            dtype=dtype,
            api_key=api_key,
        )
        exit_code = run_replay(options, console)
    raise typer.Exit(exit_code)
