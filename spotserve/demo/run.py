"""The demonstration: the same requests twice, on a fleet that stays and on one that keeps being taken away.

The first pass gives the answers and the latencies of a steady fleet; the second replays a capacity trace with losses, some
with notice and some without. The demonstration passes when no request is lost and no token differs.
"""

import asyncio
from pathlib import Path

from rich.console import Console

from spotserve.config import LocalCloudSettings
from spotserve.replay import live
from spotserve.replay.folder import write_folder
from spotserve.replay.live_report import full_summary
from spotserve.replay.record import RunRecord
from spotserve.replay.report import describe, print_report, report_text
from spotserve.replay.run import REPLAYED, ReplayOptions, connected, driven_by_trace, is_sound, judge, read_timeline
from spotserve.replay.timeline import Scaling, Timeline

STEADY = "steady"
TRACES = Path(__file__).parents[2] / "traces"
"""In the source tree; another place is an argument."""
CAPACITY = TRACES / "demo-capacity.csv"
REQUESTS = TRACES / "demo-requests.csv"
PRICES = LocalCloudSettings()
SCALING = Scaling(grace_s=3.0, notice_share=0.5, seed=29)
"""Three seconds of notice to a minute of trace stand for the clouds' half minute to two minutes."""


def run_demo(
    url: str,
    secret: str,
    out: Path,
    console: Console,
    *,
    prices: LocalCloudSettings = PRICES,
    dtype: str = "float32",
    capacity: Path = CAPACITY,
    requests: Path = REQUESTS,
    scaling: Scaling = SCALING,
) -> int:
    """Runs both passes against a running cluster, reports, writes `out`; 0 only if nothing was lost or altered.

    Raises:
        TraceError, ConfigError, CloudError: before the first pass began, or the fleet never became ready.
    """
    options = ReplayOptions(
        url=url, secret=secret, out=out, requests=requests, capacity=capacity, scaling=scaling, dtype=dtype, prices=prices
    )
    timeline = read_timeline(capacity, requests, scaling)
    console.print(describe(timeline))
    steady, disturbed = asyncio.run(_both_passes(options, timeline, console))
    steady_summary = full_summary(steady, prices=prices, objectives=options.objectives)
    comparisons, summary = judge(options, disturbed, steady)
    runs = {STEADY: (steady, steady_summary), REPLAYED: (disturbed, summary)}
    print_report(console, runs)
    write_folder(
        out,
        options=options.as_json(),
        traces=(capacity, requests),
        runs=runs,
        judged=REPLAYED,
        report=report_text(runs),
        prices=options.prices,
        comparisons=comparisons,
    )
    passed = is_sound(summary) and is_sound(steady_summary)
    console.print(_sentence(disturbed, summary["requests_lost"], summary["tokens_altered"]))
    console.print(f"written to {out}")
    return 0 if passed else 1


def _sentence(run: RunRecord, lost: float | None, altered: float | None) -> str:
    losses = sum(event.kind == "lost" for event in run.fleet_events)
    return f"{losses} instances lost, {len(run.requests)} requests: {lost} lost, {altered} tokens altered"


async def _both_passes(options: ReplayOptions, timeline: Timeline, console: Console) -> tuple[RunRecord, RunRecord]:
    async with connected(options, console) as system, driven_by_trace(system, options.prices):
        steady = await live.carry_out(timeline.undisturbed(), system, label=STEADY, patience_s=options.patience_s)
        return steady, await live.carry_out(timeline, system, label=REPLAYED, patience_s=options.patience_s)
