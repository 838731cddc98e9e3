"""Verbs about trace files: what is in one, making one, writing one in another format."""

import json
from collections.abc import Sequence
from dataclasses import fields
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from spotserve.cli.program import app, console
from spotserve.core.errors import ConfigError
from spotserve.replay.describe import describe_capacity, describe_requests
from spotserve.replay.formats import parse_trace, read_trace_text
from spotserve.replay.generate import FleetModel, LoadModel, fleet_comments, fleet_events, load_comments, load_requests
from spotserve.replay.report import bars
from spotserve.replay.rows import Options
from spotserve.replay.trace import CapacityTrace, RequestTrace, capacity_csv, requests_csv
from spotserve.replay.trace_writers import counts_of, write_trace

traces = typer.Typer(no_args_is_help=True, help="Trace files: describe, make, convert.")
app.add_typer(traces, name="traces")
make = typer.Typer(no_args_is_help=True, help="Make a trace from statistics and a seed; the same flags give the same bytes.")
traces.add_typer(make, name="make")

COLUMNS = 56
Tick = Annotated[float | None, typer.Option(help="Seconds between two counts of a spot-traces file, if not as it says.")]
Seed = Annotated[int, typer.Option(help="Draws which instance goes where a file has only counts.")]
OutputTokens = Annotated[int, typer.Option(help="Tokens of answers, where a file does not say.")]


@traces.command()
def describe(
    files: Annotated[list[Path], typer.Argument(help="Capacity or request traces, of any known format.")],
    tick: Tick = None,
    seed: Seed = 0,
    output_tokens: OutputTokens = 128,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts: one object a file.")] = False,
) -> None:
    """Say what is in a trace: length, rate, burstiness, losses, and what was assumed in reading it.

    Example:

        spotserve traces describe traces/fleet-6h.csv traces/load-diurnal-6h.csv
    """
    options = Options(seed=seed, tick_s=tick, output_tokens=output_tokens)
    for path in files:
        trace = parse_trace(read_trace_text(path), str(path), options)
        facts = describe_capacity(trace) if isinstance(trace, CapacityTrace) else describe_requests(trace)
        if as_json:
            print(json.dumps({"file": str(path), **facts}))
            continue
        console.print(Text(str(path), style="bold"))
        console.print(_picture(trace))
        console.print(_table(facts))
        for told in facts["assumed"]:
            console.print(Text(f"  assumed: {told}", style="dim"))
        console.print()


def _picture(trace: CapacityTrace | RequestTrace) -> Text:
    if isinstance(trace, CapacityTrace):
        points = counts_of(trace)
        end_s = trace.end_s if trace.end_s is not None else (points[-1][0] if points else 0.0)
        title, values = "instances", _sampled(points, end_s)
    else:
        arrivals = [request.arrival_s for request in trace.requests]
        end_s = arrivals[-1] if arrivals else 0.0
        counts = [0.0] * COLUMNS
        for at_s in arrivals:
            counts[min(COLUMNS - 1, int(at_s / max(end_s, 1e-9) * COLUMNS))] += 1
        title, values = "requests", counts
    return Text.assemble(f"  {title:>9} ", (bars(values), "cyan"), f"  {_duration(end_s)}")


def _sampled(points: Sequence[tuple[float, int]], end_s: float) -> list[float]:
    values, place, count = [], 0, 0
    for column in range(COLUMNS):
        at_s = (column + 0.5) * end_s / COLUMNS
        while place < len(points) and points[place][0] <= at_s:
            count = points[place][1]
            place += 1
        values.append(float(count))
    return values


_TIMES = {"length_s", "life_median_s", "life_mean_s", "longest_gap_s"}
_HIDDEN = {"assumed", "kind", "time_by_instances_s"}


def _table(facts: dict[str, Any]) -> Table:
    shown = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
    for name, value in facts.items():
        if name in _HIDDEN or value is None:
            continue
        title = name.removesuffix("_s").replace("_", " ") if name in _TIMES else name.replace("_", " ")
        shown.add_row(title, _duration(value) if name in _TIMES else _value(value))
    return shown


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"
    if isinstance(value, dict):
        return ", ".join(f"{count} x {size}" for size, count in value.items()) or "-"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


@traces.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A trace of any known format.")],
    destination: Annotated[Path, typer.Argument(help="The file to write.")],
    format_name: Annotated[str, typer.Option("--format", help="Of the new file; a wrong one lists those that there are.")],
    tick: Tick = None,
    seed: Seed = 0,
    output_tokens: OutputTokens = 128,
) -> None:
    """Write a trace in another format. What that cannot hold is left out."""
    options = Options(seed=seed, tick_s=tick, output_tokens=output_tokens)
    text = write_trace(parse_trace(read_trace_text(source), str(source), options), format_name)
    _write(destination, text)


def _write(out: Path | None, text: str) -> None:
    if out is None:
        print(text, end="")
        return
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error}") from error


def _with_flags_of(model: type[FleetModel] | type[LoadModel], verb: Any) -> Any:
    """A command whose options are the fields of a model: they are said once."""
    options = [
        Parameter(
            each.name,
            Parameter.KEYWORD_ONLY,
            default=each.default,
            annotation=Annotated[type(each.default), typer.Option(help=_HELP.get(each.name, ""))],
        )
        for each in fields(model)
    ]
    out = Parameter(
        "out", Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[Path | None, typer.Option(help="File; none: printed.")]
    )
    verb.__signature__ = Signature([*options, out])
    return verb


def _make_capacity(*, out: Path | None, **given: Any) -> None:
    """A fleet: lives of CV 1, losses that take several at once, zones that lose together."""
    model = FleetModel(**given)
    events = fleet_events(model)
    _write(out, capacity_csv(events, fleet_comments(model, events)))


def _make_requests(*, out: Path | None, **given: Any) -> None:
    """Requests: Poisson, Gamma (burstier, by --gap-cv) or diurnal arrivals, log-normal lengths."""
    model = LoadModel(**given)
    requests = load_requests(model)
    _write(out, requests_csv(requests, load_comments(model, requests)))


_HELP = {
    "instances": "The fleet that is wanted, and there at the start.",
    "duration_s": "Length of the trace.",
    "mean_life_s": "Mean life of an instance.",
    "mean_restock_s": "Mean time until a lost instance's place is filled again.",
    "bulk_share": "Share of the moments of loss that take two instances or more.",
    "bulk_extra": "Mean number of instances that such a moment takes beyond the second.",
    "zones": "Zones that instances are spread over.",
    "zone_correlation": "How often a bulk loss takes from every zone and not from one.",
    "keep": "Instances that are never taken.",
    "rate_per_s": "Mean requests per second.",
    "arrivals": "poisson, gamma or diurnal.",
    "gap_cv": "Coefficient of variation of the gaps, for gamma.",
    "swing": "How far the rate leaves its mean, as a share of it, for diurnal.",
    "period_s": "Length of the day, for diurnal.",
    "length_sigma": "Standard deviation of the logarithm of lengths.",
    "greedy_share": "Share of requests with temperature 0.",
    "seed": "The same seed gives the same bytes.",
}

make.command("capacity")(_with_flags_of(FleetModel, _make_capacity))
make.command("requests")(_with_flags_of(LoadModel, _make_requests))
