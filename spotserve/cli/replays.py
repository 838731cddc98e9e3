"""The verbs around replays of traces: simulate, or drive a running system; compare two; list who may decide."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from spotserve.cli.plan_inputs import read_draft, read_limits, read_model
from spotserve.cli.program import app, console
from spotserve.cli.reach import system_url
from spotserve.cli.replay_runs import command_of, drive, refuse, simulate
from spotserve.config import LocalCloudSettings
from spotserve.core.errors import ConfigError
from spotserve.planner.devices import instance_type, price_usd_per_hour
from spotserve.planner.memory import STEP_TOKENS
from spotserve.planner.workload import Objective
from spotserve.replay.comparison import Compared, compare_folders
from spotserve.replay.intervals import Interval
from spotserve.replay.policies import POLICIES
from spotserve.replay.rows import Options
from spotserve.replay.run import ReplayOptions
from spotserve.replay.scenario import Delays, Prices
from spotserve.replay.study import StudyOptions
from spotserve.replay.summary import Objectives
from spotserve.replay.svg import number_text
from spotserve.replay.timeline import Scaling
from spotserve.replay.verdicts import read_claim

OURS = "spotserve"
_TRACES, _SIMULATION, _REPORT, _LIVE = "What is played", "The simulation", "Prices and the report", "Against a running system"
_SIMULATED_ONLY = (
    "model",
    "devices",
    "start_up",
    "rent",
    "fall_back",
    "max_batch",
    "step_tokens",
    "draft",
    "repeat",
    "jobs",
    "tick",
    "output_tokens",
)
_LIVE_ONLY = ("url", "instances", "api_key", "reference")

replay = typer.Typer(invoke_without_command=True)
app.add_typer(replay, name="replay")


@replay.callback()
def play(
    context: typer.Context,
    requests: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Trace of requests: when, how long, how much. Needed.", show_default=False, rich_help_panel=_TRACES
        ),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder of the report.", rich_help_panel=_REPORT)] = Path(
        "runs/replay"
    ),
    capacity: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Trace of machines that come and go; several: one for each zone.",
            show_default=False,
            rich_help_panel=_TRACES,
        ),
    ] = None,
    model: Annotated[
        str, typer.Option(help="A name such as llama-3-8b or gpt-20b, a folder, or a hub id.", rich_help_panel=_SIMULATION)
    ] = "llama-3-8b",
    devices: Annotated[
        str, typer.Option(metavar="TYPE", help="Type of the machines, such as g4dn.12xlarge.", rich_help_panel=_SIMULATION)
    ] = "g5.12xlarge",
    policy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Who decides; several are compared. `spotserve replay policies` lists them.",
            show_default=OURS,
            rich_help_panel=_SIMULATION,
        ),
    ] = None,
    grace: Annotated[float, typer.Option(help="Seconds of notice (no trace holds it).", rich_help_panel=_TRACES)] = 30.0,
    notice_share: Annotated[float, typer.Option(help="Share of losses that come with a notice.", rich_help_panel=_TRACES)] = 1.0,
    start_up: Annotated[
        float, typer.Option(help="Seconds from renting a machine until its worker takes commands.", rich_help_panel=_SIMULATION)
    ] = 120.0,
    slo: Annotated[
        str | None,
        typer.Option(
            metavar="LIMITS", help="ttft=2,tpot=0.1,e2e=60: what is good, and what is planned for.", rich_help_panel=_TRACES
        ),
    ] = None,
    rent: Annotated[
        bool,
        typer.Option(
            help="Rent only what the load needs of the trace's machines; else all are paid for.", rich_help_panel=_SIMULATION
        ),
    ] = False,
    fall_back: Annotated[
        bool, typer.Option(help="With --rent: stand in on demand while the trace has no machine.", rich_help_panel=_SIMULATION)
    ] = True,
    max_batch: Annotated[
        int, typer.Option(help="Sequences that a replica runs at once at most.", rich_help_panel=_SIMULATION)
    ] = 256,
    step_tokens: Annotated[
        int, typer.Option(help="Tokens of the largest step: longer prompts are cut into pieces.", rich_help_panel=_SIMULATION)
    ] = STEP_TOKENS,
    draft: Annotated[
        str | None,
        typer.Option(
            metavar="ACCEPTANCE:SHARE",
            help="Replicas draft: chance and cost of a drafted token, as 0.7:0.1.",
            rich_help_panel=_SIMULATION,
        ),
    ] = None,
    spot_price: Annotated[
        float | None, typer.Option(min=0, help="USD per hour of a spot machine.", show_default="table", rich_help_panel=_REPORT)
    ] = None,
    on_demand_price: Annotated[
        float | None,
        typer.Option(min=0, help="USD per hour of a machine on demand.", show_default="table", rich_help_panel=_REPORT),
    ] = None,
    start: Annotated[
        float, typer.Option(help="Seconds of the traces to leave out at their beginning.", rich_help_panel=_TRACES)
    ] = 0.0,
    duration: Annotated[
        float | None, typer.Option(help="Seconds of the traces to play.", show_default="all", rich_help_panel=_TRACES)
    ] = None,
    time_scale: Annotated[
        float, typer.Option(help="Seconds of trace per second of replay: 2 is twice as fast.", rich_help_panel=_TRACES)
    ] = 1.0,
    rate_scale: Annotated[
        list[float] | None,
        typer.Option(
            metavar="FACTOR", help="Requests per request of the trace; several: a sweep.", show_default="1", rich_help_panel=_TRACES
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws victims, notices, offsets and prompts.", rich_help_panel=_TRACES)] = 0,
    repeat: Annotated[
        int,
        typer.Option(
            min=1, help="Repeats, each with the requests turned against the fleet's history.", rich_help_panel=_SIMULATION
        ),
    ] = 1,
    jobs: Annotated[
        int, typer.Option(min=1, help="Runs side by side; results do not depend on it.", rich_help_panel=_SIMULATION)
    ] = 1,
    assertion: Annotated[
        list[str] | None,
        typer.Option(
            "--assert",
            metavar="CLAIM",
            help="What must hold, as 'e2e_p99_s<60'; else exit code 1.",
            show_default=False,
            rich_help_panel=_REPORT,
        ),
    ] = None,
    tick: Annotated[
        float | None,
        typer.Option(help="Seconds between counts of a spot-traces file.", show_default="its own", rich_help_panel=_TRACES),
    ] = None,
    output_tokens: Annotated[
        int, typer.Option(help="Tokens of answers, where a file does not say.", rich_help_panel=_TRACES)
    ] = 128,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.", rich_help_panel=_REPORT)] = False,
    live: Annotated[
        bool, typer.Option("--live", help="Against a running system instead of a simulated one.", rich_help_panel=_LIVE)
    ] = False,
    url: Annotated[
        str | None,
        typer.Option(
            "--url",
            envvar="SPOTSERVE_URL",
            callback=system_url,
            help="Live: a running system; none: one is started.",
            rich_help_panel=_LIVE,
        ),
    ] = None,
    instances: Annotated[
        int, typer.Option(help="Live: instances of a system that is started for this.", rich_help_panel=_LIVE)
    ] = 4,
    dtype: Annotated[
        str,
        typer.Option(help="What the model computes in: its size, and live how near a near tie is.", rich_help_panel=_SIMULATION),
    ] = "float32",
    api_key: Annotated[
        str | None,
        typer.Option(envvar="SPOTSERVE_API_KEY", help="Live: key of the gateway, if it wants one.", rich_help_panel=_LIVE),
    ] = None,
    reference: Annotated[
        bool, typer.Option(help="Live: answer everything once more, undisturbed, and compare the tokens.", rich_help_panel=_LIVE)
    ] = True,
) -> None:
    """Play traces of machines and requests, and report what clients would see. Simulated, unless --live.

    Six hours in which machines come and go, decided as in production:

        spotserve replay --capacity traces/fleet-6h.csv --requests traces/load-diurnal-6h.csv

    Policies beside each other, five times over, with intervals:

        spotserve replay --capacity traces/fleet-6h.csv --requests traces/load-diurnal-6h.csv --policy spotserve \\
            --policy spotserve-2024 --policy on-demand --repeat 5 --jobs 2 --out runs/compared

    In CI, with an exit code:

        spotserve replay --capacity FLEET --requests LOAD --assert 'requests_lost==0' --assert 'p99_e2e_s<60'

    The same traces against a real system, and how far the simulation was off:

        spotserve replay --live --capacity traces/demo-capacity.csv --requests traces/demo-requests.csv --grace 3 \\
            --out runs/live

        spotserve replay compare runs/simulated runs/live --fidelity
    """
    if context.invoked_subcommand is not None:
        return
    if requests is None:
        raise typer.BadParameter("a trace of requests is needed", param_hint="--requests")
    claims = [read_claim(text) for text in assertion or ()]
    limits = read_limits(slo)
    objectives = replace(Objectives(), **limits)
    rates = tuple(dict.fromkeys(rate_scale or (1.0,)))
    scaling = Scaling(
        start_s=start, duration_s=duration, time_scale=time_scale, grace_s=grace, notice_share=notice_share, seed=seed
    )
    if live:
        _check_live(context, policy or (), capacity or (), rates)
        prices = LocalCloudSettings()
        given = {"spot_usd_per_hour": spot_price, "on_demand_usd_per_hour": on_demand_price}
        prices = prices.model_copy(update={name: price for name, price in given.items() if price is not None})

        def options_of(url: str, secret: str) -> ReplayOptions:
            return ReplayOptions(
                url=url,
                secret=secret,
                out=out,
                requests=requests,
                capacity=capacity[0] if capacity else None,
                scaling=replace(scaling, rate_scale=rates[0]),
                reference=reference,
                dtype=dtype,
                api_key=api_key,
                objectives=objectives,
                prices=prices,
            )

        raise typer.Exit(drive(options_of, claims, url=url, instances=instances, as_json=as_json))
    refuse(context, _LIVE_ONLY, "goes with --live")
    if not capacity:
        raise ConfigError("--capacity FILE is needed to simulate: it says what machines there are, and when")
    shape = read_model(model, dtype)
    options = StudyOptions(
        capacity=tuple(capacity),
        requests=requests,
        model=shape,
        machine=instance_type(devices, value_bytes=4 if shape.value_bytes >= 4 else 2),
        prices=Prices(
            spot_usd_per_hour=price_usd_per_hour(devices, spot=True) if spot_price is None else spot_price,
            on_demand_usd_per_hour=price_usd_per_hour(devices, spot=False) if on_demand_price is None else on_demand_price,
        ),
        policies=tuple(dict.fromkeys(policy or (OURS,))),
        scaling=scaling,
        rate_scales=rates,
        reading=Options(seed=seed, tick_s=tick, output_tokens=output_tokens),
        delays=Delays(start_up_s=start_up),
        objectives=objectives,
        limits=Objective(**limits),
        max_batch=max_batch,
        step_tokens=step_tokens,
        draft=read_draft(draft),
        rents=rent,
        falls_back=fall_back,
        repeats=repeat,
        jobs=jobs,
    )
    raise typer.Exit(simulate(options, out, claims, command=command_of(context), as_json=as_json))


def _check_live(context: typer.Context, policies: Sequence[str], capacity: Sequence[Path], rates: Sequence[float]) -> None:
    """What a running system cannot be asked for.

    Raises:
        ConfigError: it was.
    """
    refuse(context, _SIMULATED_ONLY, "is of the simulation; with --live the running system has its own")
    if any(name != OURS for name in policies):
        raise ConfigError(f"--policy {next(name for name in policies if name != OURS)}: with --live what runs decides: {OURS}")
    if len(rates) > 1:
        raise ConfigError("--rate-scale: with --live one rate at a time")
    if len(capacity) > 1:
        raise ConfigError("--capacity: with --live one trace of machines")


@replay.command()
def compare(
    first: Annotated[str, typer.Argument(help="Folder of a replay, or FOLDER:POLICY.", show_default=False)],
    second: Annotated[str, typer.Argument(help="The one that it is held against.", show_default=False)],
    fidelity: Annotated[bool, typer.Option("--fidelity", help="How far a simulated one is off a live one, in percent.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Hold two replays against each other: every number, the difference and the ratio, with intervals where both were repeated.

    Two policies of one study:

        spotserve replay compare runs/day:spotserve runs/day:on-demand

    Today's build against yesterday's:

        spotserve replay compare runs/today runs/yesterday --json

    Simulated against live, on the same traces:

        spotserve replay compare runs/simulated runs/live --fidelity
    """
    comparison = compare_folders(first, second, only_fidelity=fidelity)
    if as_json:
        print(json.dumps(comparison.as_json()))
        return
    for warning in comparison.warnings:
        console.print(Text(f"not the same: {warning}", style="yellow"))
    console.print(_fidelity_table(comparison.rows) if fidelity else _table(first, second, comparison.rows))


def _table(first: str, second: str, rows: Sequence[Compared]) -> Table:
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("", first, second, "difference", "ratio"):
        shown.add_column(title, justify="right" if title else "left")
    for row in rows:
        pair = row.contrast
        difference = _told(row.difference, pair.difference if pair else None)
        ratio = _told(row.ratio, pair.ratio if pair else None)
        is_sure = pair is not None and pair.difference.excludes_zero
        shown.add_row(row.name, _told(row.first), _told(row.second), Text(difference, style="bold" if is_sure else ""), ratio)
    return shown


def _fidelity_table(rows: Sequence[Compared]) -> Table:
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("", "simulated", "live", "error, %"):
        shown.add_column(title, justify="right" if title else "left")
    for row in rows:
        error = "–" if row.error_percent is None else f"{row.error_percent:+.1f}"
        shown.add_row(row.name, _told(row.first), _told(row.second), error)
    return shown


def _told(value: float | None, around: Interval | None = None) -> str:
    if value is None:
        return "–"
    return number_text(value) + (f" [{number_text(around.low)}, {number_text(around.high)}]" if around else "")


@replay.command()
def policies(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False) -> None:
    """List who can decide in a simulated replay, what each models, and what it leaves out."""
    if as_json:
        print(json.dumps({each.name: {"models": each.models, "leaves_out": each.leaves_out} for each in POLICIES.values()}))
        return
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("policy", "models", "leaves out"):
        shown.add_column(title)
    for each in POLICIES.values():
        shown.add_row(each.name, each.models, each.leaves_out)
    console.print(shown)
