"""How long clients wait around a preemption: gaps between the token events of streams while instances are taken away.

    python benchmarks/preemption_gap.py --instances 4 --each 20 --json

`--streams` clients each send a call every so often, paced so that together they ask for `--load` of what the system can make
(measured first, with as many calls at once as there are streams), because at full load every gap is a wait for a processor.
Instances are then taken one at a time, in turn with a notice (`--grace` seconds) and without; the next one goes when all
serve again and `--settle` seconds have passed.

Per preemption, the longest gap that any interrupted sequence saw: interrupted is what the controller's event log says was
moved or resumed, waiting for a first token counts. Bystanders are all other streams at that time. Steady gaps are those that
lie further than `--margin` seconds from any disturbance, from the notice until the new instance serves.
"""

import argparse
import asyncio
import json
import random
import signal
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
from cluster import machine, percentile, running_system
from gap_figures import (
    WITH_NOTICE,
    WITHOUT_NOTICE,
    Preemption,
    Span,
    around,
    gaps_of,
    notice_to_table,
    steady_gaps_s,
    summary,
    tokens_within,
)
from load import Load
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from spotserve.replay.admin import Admin
from spotserve.replay.record import FleetEvent
from spotserve.system_clock import SystemClock

CALIBRATION_S = 8.0
CALIBRATION_WARMUP_S = 2.0
RAMP_S = 12.0
"""Calls begin evenly from the start: load is steady once the first of them have ended."""
SERVE_AGAIN_S = 60.0
CLOCK = SystemClock()


def _load(url: str, model: str, args: argparse.Namespace) -> Load:
    return Load(url, model, streams=args.streams, prompt_tokens=args.prompt_tokens, tokens=args.tokens, seed=args.seed)


async def _capacity_tokens_per_s(load: Load) -> float:
    """Output tokens per second with every stream busy all the time."""
    running = asyncio.create_task(load.run(0.0), name="calibration")
    await asyncio.sleep(CALIBRATION_WARMUP_S)
    start_s = CLOCK.now_s()
    await asyncio.sleep(CALIBRATION_S)
    end_s = CLOCK.now_s()
    load.stop()
    await running
    return tokens_within(load.records, Span(start_s, end_s)) / (end_s - start_s)


async def _preempt_in_turn(
    admin: Admin, events: list[FleetEvent], args: argparse.Namespace, progress: Progress
) -> list[Preemption]:
    """Takes `each` instances with and `each` without a notice."""
    choose = random.Random(args.seed)
    task = progress.add_task("preemptions", total=2 * args.each)
    preemptions = []
    for number in range(2 * args.each):
        kind, grace_s = (WITH_NOTICE, args.grace) if number % 2 == 0 else (WITHOUT_NOTICE, 0.0)
        status = await admin.status()
        victim = choose.choice([instance.id for instance in status.instances if instance.state == "ready"])
        progress.update(task, description=f"{victim} {kind}")
        start_s = CLOCK.now_s()
        await admin.preempt(victim, grace_s=grace_s)
        await _wait_until_lost_and_replaced(admin, events, victim, args.instances)
        preemptions.append(Preemption(kind, victim, Span(start_s, CLOCK.now_s())))
        progress.advance(task)
        await asyncio.sleep(args.settle)
    return preemptions


async def _wait_until_lost_and_replaced(admin: Admin, events: list[FleetEvent], victim: str, instances: int) -> None:
    async with asyncio.timeout(SERVE_AGAIN_S):
        while True:
            events += await admin.new_events()
            lost = any(event.kind == "lost" and event.instance == victim for event in events)
            if lost and sum(replica.state == "serving" for replica in (await admin.status()).replicas) >= instances:
                return
            await asyncio.sleep(0.1)


async def _measure(url: str, secret: str, args: argparse.Namespace, console: Console) -> dict[str, Any]:
    admin = Admin(url, secret)
    model = (await admin.status()).model_name
    with console.status("measuring capacity"):
        capacity = await _capacity_tokens_per_s(_load(url, model, args))
    cycle_s = args.streams * args.tokens / (args.load * capacity)
    console.print(f"capacity {capacity:,.0f} tokens/s; {args.streams} streams, each a call every {cycle_s:.2f} s")
    load, events = (
        _load(url, model, args),
        await admin.new_events(),
    )
    running = asyncio.create_task(load.run(cycle_s), name="load")
    with Progress(console=console) as progress:
        await _quiet("ramp", RAMP_S, progress)
        start_s = CLOCK.now_s()
        await _quiet("steady", args.steady, progress)
        preemptions = await _preempt_in_turn(admin, events, args, progress)
        await _quiet("steady", args.steady, progress)
    end_s = CLOCK.now_s()
    load.stop()
    await running
    events += await admin.new_events()
    await admin.close()
    async with httpx.AsyncClient(timeout=10.0) as client:
        metrics = (await client.get(f"{url}/metrics")).text
    gaps = gaps_of(load.records)
    steady = steady_gaps_s(gaps, preemptions, Span(start_s, end_s), args.margin)
    rows = [around(preemption, gaps, events) for preemption in preemptions]
    return {
        "capacity_tokens_per_s": capacity,
        "load_tokens_per_s": tokens_within(load.records, Span(start_s, end_s)) / (end_s - start_s),
        "answers": len(load.records),
        "failed": [record.error for record in load.records if record.error is not None],
        "steady": {"gaps": len(steady), "p50_s": percentile(steady, 0.5), "p99_s": percentile(steady, 0.99), "max_s": max(steady)},
        WITH_NOTICE: summary(WITH_NOTICE, rows),
        WITHOUT_NOTICE: summary(WITHOUT_NOTICE, rows),
        "notice_to_table": notice_to_table(metrics),
        "goals": {WITH_NOTICE: 5 * percentile(steady, 0.99), WITHOUT_NOTICE: 1.0, "notice_to_table": 0.05},
        "each": rows,
    }


async def _quiet(name: str, seconds: float, progress: Progress) -> None:
    """Lets steady load run."""
    task = progress.add_task(name, total=seconds)
    start_s = CLOCK.now_s()
    while (passed_s := CLOCK.now_s() - start_s) < seconds:
        progress.update(task, completed=passed_s)
        await asyncio.sleep(min(0.5, seconds - passed_s))
    progress.update(task, completed=seconds)


def _table(report: dict[str, Any]) -> Table:
    steady, goals, kinds = report["steady"], report["goals"], (WITH_NOTICE, WITHOUT_NOTICE)
    table = Table(title=f"steady gaps: p50 {_ms(steady['p50_s'])}, p99 {_ms(steady['p99_s'])}, max {_ms(steady['max_s'])}")
    table.add_column("preemptions")
    for kind in kinds:
        table.add_column(kind, justify="right", no_wrap=True)
    rows = [report[kind] for kind in kinds]
    table.add_row("instances taken", *(str(row["preemptions"]) for row in rows))
    table.add_row("that interrupted something", *(str(row["preemptions_that_interrupted"]) for row in rows))
    for event in ("moved", "resumed"):
        table.add_row(f"sequences {event}", *(str(row["sequences"].get(event, 0)) for row in rows))
    for name in ("p50", "p99", "max"):
        table.add_row(f"longest gap of each, {name}", *(_ms(row[f"longest_gap_{name}_s"]) for row in rows))
    table.add_row("goal for p99", *(f"<= {_ms(goals[kind])}" for kind in kinds))
    table.add_row("bystanders' longest, max", *(_ms(row["bystanders_longest_gap_max_s"]) for row in rows))
    return table


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:,.1f} ms"


def _print(report: dict[str, Any], console: Console) -> None:
    console.print(_table(report))
    notice = report["notice_to_table"]
    console.print(
        f"notice to routing table without the instance: {notice['count']} notices, mean {_ms(notice['mean_s'])}, "
        f"all within {_ms(notice['all_within_s'])} (goal: within {_ms(report['goals']['notice_to_table'])})"
    )
    console.print(f"{report['answers']} answers, {len(report['failed'])} failed {report['failed'][:3] or ''}")


def main() -> None:
    """Runs and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=4)
    parser.add_argument("--each", type=int, default=20, help="preemptions with a notice, and as many without")
    parser.add_argument("--grace", type=float, default=3.0, help="seconds of notice")
    parser.add_argument("--restock", type=float, default=1.0, help="seconds until a taken instance is replaced")
    parser.add_argument("--settle", type=float, default=3.0, help="seconds between all serve again and the next preemption")
    parser.add_argument("--steady", type=float, default=20.0, help="undisturbed seconds before the first and after the last")
    parser.add_argument("--margin", type=float, default=3.0, help="seconds around a disturbance that are not steady")
    parser.add_argument("--streams", type=int, default=24, help="clients")
    parser.add_argument("--load", type=float, default=0.4, help="share of the capacity that is asked for")
    parser.add_argument("--tokens", type=int, default=800, help="output tokens per call")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="about this many per call")
    parser.add_argument("--store", default="sqlite", help="sqlite, none or a Redis URL")
    parser.add_argument("--speculation", default="off", help="as for `spotserve up`; off: one token per event")
    parser.add_argument("--seed", type=int, default=0, help="chooses prompts and victims")
    parser.add_argument("--out", type=Path, help="write the JSON, with a row per preemption, to this file, too")
    parser.add_argument("--keep-logs", type=Path, help="leave the system's folder, with all logs, here")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that systems are ended, as on Ctrl-C
    console = Console(stderr=True)
    with ExitStack() as at_end:
        home = args.keep_logs or Path(at_end.enter_context(tempfile.TemporaryDirectory()))
        flags = ["--restock", str(args.restock), "--speculation", args.speculation]
        flags += [] if args.store == "sqlite" else ["--store", args.store]
        measured_on = machine()
        with console.status("starting a system"):
            system = at_end.enter_context(running_system(home.absolute(), *flags, instances=args.instances))
        report = asyncio.run(_measure(system.url, system.secret, args, console))
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "json", "keep_logs")}
    document = json.dumps({"benchmark": "preemption_gap", "machine": measured_on, "settings": settings, **report})
    if args.out is not None:
        args.out.write_text(document + "\n")
    if args.json:
        print(document)
    else:
        _print(report, Console())


if __name__ == "__main__":
    main()
