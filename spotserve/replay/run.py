"""A replay from its options to its exit code: the verb behind `spotserve replay --live`."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from spotserve.config import LocalCloudSettings
from spotserve.core.errors import ConfigError
from spotserve.replay import live
from spotserve.replay.admin import Admin
from spotserve.replay.client import StreamClient
from spotserve.replay.compare import Comparison, compare_runs
from spotserve.replay.folder import write_folder
from spotserve.replay.formats import parse_capacity, parse_requests, read_trace_text
from spotserve.replay.live_report import full_summary
from spotserve.replay.prompts import prompt_of
from spotserve.replay.record import RunRecord
from spotserve.replay.report import describe, print_report, report_text
from spotserve.replay.summary import Objectives, Summary
from spotserve.replay.timeline import Scaling, Timeline, merge
from spotserve.system_clock import SystemClock

REPLAYED = "with preemptions"
REFERENCE = "reference"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayOptions:
    """What is replayed, against what, and where the results go."""

    url: str
    secret: str
    """The admin secret of the system."""
    out: Path
    requests: Path
    capacity: Path | None = None
    """None: the fleet is left as it is."""
    scaling: Scaling = field(default_factory=Scaling)
    reference: bool = True
    """Answer every request once more, undisturbed, and compare the tokens."""
    reference_concurrency: int = 8
    patience_s: float = 120.0
    """A request without a whole answer after this long is lost; a fleet that is not ready after this long, an error."""
    dtype: str = "float32"
    """What the engine computes in: says how near a near tie is."""
    api_key: str | None = None
    objectives: Objectives = field(default_factory=Objectives)
    prices: LocalCloudSettings = field(default_factory=LocalCloudSettings)
    """Prices, and the restocking time that the cluster gets back after a trace has driven its fleet."""

    def as_json(self) -> dict[str, object]:
        """The options without what is secret."""
        kept = {name: value for name, value in asdict(self).items() if name not in ("secret", "api_key", "prices")}
        return {**kept, "prices": self.prices.model_dump()}


def read_timeline(capacity: Path | None, requests: Path, scaling: Scaling) -> Timeline:
    """The timeline of trace files.

    Raises:
        TraceError: a file cannot be read, or does not hold what its format promises.
        ConfigError: no request lies in the part that is to be replayed.
    """
    fleet = parse_capacity(read_trace_text(capacity), str(capacity)) if capacity else None
    load = parse_requests(read_trace_text(requests), str(requests))
    timeline = merge(fleet, load, scaling)
    if not timeline.arrivals:
        last_s = load.requests[-1].arrival_s if load.requests else 0.0
        raise ConfigError(
            f"start_s={scaling.start_s:g}, duration_s={scaling.duration_s}: no request of {requests} in it (0-{last_s:g} s)"
        )
    return timeline


@asynccontextmanager
async def connected(options: ReplayOptions, console: Console) -> AsyncIterator[live.System]:
    """The running system, with a progress line on the console.

    Raises:
        CloudError: the system is out of reach.
        ConfigError: the address is none, or the system serves no model.
    """
    admin = Admin(options.url, options.secret)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} answered, {task.fields[lost]} lost, {task.fields[tokens]:,} tokens"),
        TextColumn("fleet {task.fields[instances]}, losses {task.fields[losses]}"),
        TimeElapsedColumn(),
        console=console,
        refresh_per_second=2,
    )
    tasks: dict[str, TaskID] = {}

    def show(now: live.Progress) -> None:
        if now.label not in tasks:
            tasks[now.label] = bar.add_task(now.label, total=now.requests_total, lost=0, tokens=0, instances=0, losses=0)
        bar.update(
            tasks[now.label],
            completed=now.requests_ended,
            lost=now.requests_lost,
            tokens=now.tokens,
            instances=now.instances,
            losses=now.losses,
        )

    try:
        model = (await admin.status()).model_name
        if not model:
            raise ConfigError(f"{options.url} serves no model yet")
        clock = SystemClock()
        client = StreamClient(options.url, model=model, clock=clock, patience_s=options.patience_s, api_key=options.api_key)
        with bar:
            yield live.System(admin, client, clock, prompt_of, show)
    finally:
        await admin.close()


@asynccontextmanager
async def driven_by_trace(system: live.System, prices: LocalCloudSettings) -> AsyncIterator[None]:
    """The local cloud replaces nothing by itself for as long as a trace drives the fleet."""
    await system.admin.restock(None)
    try:
        yield
    finally:
        await system.admin.restock(prices.restock_s)


def judge(options: ReplayOptions, run: RunRecord, reference: RunRecord | None) -> tuple[tuple[Comparison, ...], Summary]:
    """The comparison with the undisturbed answers, where there are any, and the run's summary."""
    comparisons = compare_runs(run.requests, reference.requests, dtype=options.dtype) if reference else ()
    return comparisons, full_summary(run, comparisons, prices=options.prices, objectives=options.objectives)


def is_sound(summary: Summary) -> bool:
    """Whether nothing was lost, altered, contradicted or, where answers were compared, left without a reference."""
    faults = ("requests_lost", "tokens_altered", "tokens_contradicted", "requests_without_reference")
    return not any(summary[fault] for fault in faults)


def run_replay(options: ReplayOptions, console: Console | None = None) -> int:
    """Replays, compares, reports and writes the folder; 0 only if no request was lost and no answer altered.

    Raises:
        TraceError, ConfigError, CloudError: before the replay began; see `read_timeline` and `connected`.
    """
    console = console or Console()
    timeline = read_timeline(options.capacity, options.requests, options.scaling)
    console.print(describe(timeline))
    run, reference = asyncio.run(_replay(options, timeline, console))
    comparisons, summary = judge(options, run, reference)
    shown = {REPLAYED: (run, summary)}
    print_report(console, shown)
    runs = dict(shown)
    if reference is not None:  # in the folder alone: its latencies are those of a closed loop
        runs[REFERENCE] = (reference, full_summary(reference, prices=options.prices, objectives=options.objectives))
    write_folder(
        options.out,
        options=options.as_json(),
        traces=[path for path in (options.capacity, options.requests) if path],
        runs=runs,
        judged=REPLAYED,
        report=report_text(shown),
        prices=options.prices,
        comparisons=comparisons,
    )
    console.print(f"written to {options.out}")
    return 0 if is_sound(summary) else 1


async def _replay(options: ReplayOptions, timeline: Timeline, console: Console) -> tuple[RunRecord, RunRecord | None]:
    async with connected(options, console) as system:
        if options.capacity is None:
            return await _passes(options, timeline, system)
        async with driven_by_trace(system, options.prices):
            return await _passes(options, timeline, system)


async def _passes(options: ReplayOptions, timeline: Timeline, system: live.System) -> tuple[RunRecord, RunRecord | None]:
    run = await live.carry_out(timeline, system, label=REPLAYED, patience_s=options.patience_s)
    if not options.reference:
        return run, None
    await live.prepare_fleet(system, len(timeline.initial) or None, patience_s=options.patience_s)
    concurrency = options.reference_concurrency
    reference = await live.answer_all(
        timeline.arrivals,
        system,
        label=REFERENCE,
        concurrency=concurrency,
        prefix_block_tokens=timeline.prefix_block_tokens,
    )
    return run, reference
