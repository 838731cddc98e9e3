"""A run, or two side by side, for people: a picture of the run over time and a table. Says nothing that the summary does not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from itertools import pairwise

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from spotserve.replay.generate import variation
from spotserve.replay.preemptions import preemptions
from spotserve.replay.record import RunRecord
from spotserve.replay.summary import Summary, fleet_steps
from spotserve.replay.timeline import Launch, Timeline

REPORT_COLUMNS = 120
"""Width of a report that goes into a file."""
PICTURE_COLUMNS = 96
"""At most; a narrow console gets a narrower picture."""
_LABEL_COLUMNS = 16
_FRAME_COLUMNS = 4
_BARS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True)
class Line:
    """One row of the table."""

    title: str
    key: str
    scale: float = 1.0
    """What the summary's value is multiplied by for showing."""
    decimals: int = 0
    must_be_zero: bool = False


_MS = 1000.0
SECTIONS: Mapping[str, Sequence[Line]] = {
    "Answers": (
        Line("requests", "requests_total"),
        Line("finished", "requests_finished"),
        Line("lost", "requests_lost", must_be_zero=True),
        Line("tokens", "tokens_total"),
        Line("tokens altered", "tokens_altered", must_be_zero=True),
        Line("tie flips", "tie_flips"),
        Line("tokens twice", "tokens_duplicate"),
        Line("tokens contradicted", "tokens_contradicted", must_be_zero=True),
    ),
    "Preemptions": (
        Line("with notice", "preemptions_with_notice"),
        Line("without notice", "preemptions_without_notice"),
        Line("requests in flight at a loss", "requests_in_flight_at_losses"),
        Line("requests moved or resumed", "requests_interrupted"),
        Line("tokens recomputed", "tokens_recomputed"),
        Line("actions that the cloud refused", "capacity_actions_failed", must_be_zero=True),
    ),
    "Latency, ms": (
        Line("TTFT p50", "ttft_p50_s", _MS),
        Line("TTFT p99", "ttft_p99_s", _MS),
        Line("TPOT p50", "tpot_p50_s", _MS, 1),
        Line("TPOT p99", "tpot_p99_s", _MS, 1),
        Line("end to end p50", "e2e_p50_s", _MS),
        Line("end to end p99", "e2e_p99_s", _MS),
        Line("longest gap of a request, steady, p99", "gap_steady_p99_s", _MS),
        Line("… around preemptions with notice, p99", "gap_with_notice_p99_s", _MS),
        Line("… around preemptions without notice, p99", "gap_without_notice_p99_s", _MS),
        Line("longest gap of all", "longest_gap_s", _MS),
        Line("client's own delay p99", "schedule_delay_p99_s", _MS, 1),
    ),
    "Rate and cost": (
        Line("tokens per second", "tokens_per_s", 1.0, 1),
        Line("goodput, % of all requests", "goodput_share", 100.0, 1),
        Line("cost, USD", "cost_usd", 1.0, 4),
        Line("same fleet on demand, USD", "cost_on_demand_usd", 1.0, 4),
        Line("USD per million output tokens", "usd_per_million_output_tokens", 1.0, 2),
    ),
}


def table(columns: Mapping[str, Summary]) -> Table:
    """Summaries side by side, one column each."""
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    shown.add_column("")
    for name in columns:
        shown.add_column(name, justify="right")
    for number, (section, lines) in enumerate(SECTIONS.items()):
        if number:
            shown.add_row()
        shown.add_row(Text(section, style="bold"))
        for line in lines:
            shown.add_row(f"  {line.title}", *(_cell(line, summary.get(line.key)) for summary in columns.values()))
    return shown


def _cell(line: Line, value: float | None) -> Text:
    if value is None:
        return Text("–", style="dim")
    style = ("green" if value == 0 else "bold red") if line.must_be_zero else ""
    return Text(f"{value * line.scale:,.{line.decimals}f}", style=style)


def picture(run: RunRecord, columns: int = PICTURE_COLUMNS) -> RenderableType:
    """Fleet size, tokens per second, and the marks of notices and losses, over the time of the run."""
    width_s = max(run.duration_s, 1e-9) / columns
    starts_s = [run.started_s + column * width_s for column in range(columns)]
    tokens = [0] * columns
    for record in run.requests:
        for at_s, count in zip(record.event_times_s, record.event_tokens, strict=True):
            tokens[_column(run, at_s, columns)] += count
    rates = [count / width_s for count in tokens]
    steps = fleet_steps(run)
    fleet = [[size for at_s, size in steps if at_s <= start_s + width_s / 2][-1] for start_s in starts_s]
    marks = [" "] * columns
    for preemption in preemptions(run.fleet_events):
        if preemption.notice_s is not None:
            marks[_column(run, preemption.notice_s, columns)] = "!"
    for preemption in preemptions(run.fleet_events):
        marks[_column(run, preemption.lost_s, columns)] = "x" if preemption.notice_s is not None else "X"
    lines = (
        (f"fleet, max {max(fleet)}", bars(fleet), "cyan"),
        (f"tok/s, max {max(rates):,.0f}", bars(rates), "green"),
        ("! notice, x loss", "".join(marks), "bold red"),
    )
    drawn = [Text.assemble((f"{label:<{_LABEL_COLUMNS}} ", "bold"), (line, style)) for label, line, style in lines]
    axis = Text(f"{'X without notice':<{_LABEL_COLUMNS}} 0{f'{run.duration_s:.0f} s':>{columns - 1}}", style="dim")
    return Group(*drawn, axis)


def _column(run: RunRecord, at_s: float, columns: int) -> int:
    share = (at_s - run.started_s) / max(run.duration_s, 1e-9)
    return min(columns - 1, max(0, int(share * columns)))


def bars(values: Sequence[float]) -> str:
    """Values as bars of eighths, the largest a full block; only a value of 0 is blank."""
    top = max(values, default=0) or 1
    return "".join(_BARS[0 if value <= 0 else max(1, round(value / top * (len(_BARS) - 1)))] for value in values)


def describe(timeline: Timeline) -> str:
    """One line on what is about to be replayed."""
    times_s = [arrival.at_s for arrival in timeline.arrivals]
    gaps_s = [after - before for before, after in pairwise(times_s)]
    noticed = sum(take.noticed for take in timeline.losses)
    launches = sum(isinstance(action, Launch) for action in timeline.actions)
    losses = f"{len(timeline.losses)} losses ({noticed} with notice)"
    fleet = f"{len(timeline.initial)} instances at the start, {losses}, {launches} launches"
    load = f"{len(times_s)} requests"
    if gaps_s and max(times_s) > 0:
        load += f" ({len(times_s) / max(times_s):.2f} per second, gap CV {variation(gaps_s):.2f})"
    clamped = f", {timeline.clamped_rows} rows without tokens given 1" if timeline.clamped_rows else ""
    return f"{timeline.duration_s:.0f} s: {fleet if timeline.initial else 'the fleet as it is'}; {load}{clamped}"


def report_table_text(shown: Table) -> str:
    """A table as plain text."""
    text = StringIO()
    Console(file=text, width=REPORT_COLUMNS, color_system=None).print(shown)
    return text.getvalue()


def report_text(runs: Mapping[str, tuple[RunRecord, Summary]]) -> str:
    """What `print_report` prints, as plain text."""
    text = StringIO()
    print_report(Console(file=text, width=REPORT_COLUMNS, color_system=None), runs)
    return text.getvalue()


def print_report(console: Console, runs: Mapping[str, tuple[RunRecord, Summary]]) -> None:
    """Pictures and table of runs side by side; the names become the table's columns."""
    columns = max(10, min(PICTURE_COLUMNS, console.width - _LABEL_COLUMNS - 1 - _FRAME_COLUMNS))
    for name, (run, _) in runs.items():
        console.print(Panel(picture(run, columns), title=name, title_align="left", expand=False))
    console.print(table({name: summary for name, (_, summary) in runs.items()}))
