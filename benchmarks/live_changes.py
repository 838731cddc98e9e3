"""A model that takes several devices, while machines come and go: what clients see of every kind of change.

    python benchmarks/live_changes.py --json

`--streams` clients call a local system without a pause. Its devices are too small for the model, so the planner cuts it into
stages and shards. One after the other: a loss with a notice of 10 s, of 2 s, without one; two losses at once; a loss while a change
is under way; a machine that joins while another drains; a notice that does not come true; one notice from two sources; a controller
that is killed and started again in the middle of a change.

Per change: sequences moved and resumed; the longest gap between two token events of a stream that was concerned; and the longest
one of the others, beside the 99th percentile of gaps in the quiet before it. At the end every answer must be whole and is asked for
again of the system when nothing happens any more: in float64 a difference would be a bug.
"""

import argparse
import asyncio
import json
import signal
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
from cluster import RunningSystem, machine, percentile, running_system
from gap_figures import Preemption, Span, around, gaps_of
from load import CLOCK, Load
from rich.console import Console
from rich.table import Table

from spotserve.replay.admin import Admin
from spotserve.replay.record import FleetEvent

QUIET_S = 4.0
"""Before each change: what is steady."""
SETTLED_S = 90.0
"""A change may take so long, notices of 10 s and replacements included."""
ASKED_AGAIN = 48

Deed = Callable[["_Fleet"], Awaitable[None]]


class _Fleet:
    """The system's fleet, and the levers that change it."""

    def __init__(self, system: RunningSystem, instances: int) -> None:
        self.system, self.instances = system, instances
        self._client = httpx.AsyncClient(timeout=10)

    async def post(self, path: str, body: dict[str, object]) -> Any:
        answer = await self._client.post(
            f"{self.system.url}/admin/{path}", json=body, headers={"authorization": f"Bearer {self.system.secret}"}
        )
        answer.raise_for_status()
        return answer.json()

    async def status(self) -> dict[str, Any]:
        answer: dict[str, Any] = (await self._client.get(f"{self.system.url}/status")).json()
        return answer

    async def serving_instances(self) -> list[str]:
        """Of replicas that serve, the last replica first, and of each its last stage first: no leader while there is another."""
        replicas = [each for each in (await self.status())["replicas"] if each["state"] == "serving"]
        last_first = [instance for replica in reversed(replicas) for instance in reversed(replica["instances"])]
        return list(dict.fromkeys(last_first))

    async def take(self, count: int, grace_s: float) -> None:
        for instance in (await self.serving_instances())[:count]:
            await self.post("preempt", {"instance": instance, "grace_s": grace_s})

    async def until(self, condition: Callable[[dict[str, Any]], bool]) -> None:
        async with asyncio.timeout(SETTLED_S):
            while not condition(await self.status()):
                await asyncio.sleep(0.05)

    async def until_settled(self) -> None:
        """All machines are there and everything that should serve does."""
        await self.until(
            lambda status: (
                sum(each["state"] == "ready" for each in status["instances"]) >= self.instances
                and bool(status["replicas"])
                and all(each["state"] == "serving" for each in status["replicas"])
            )
        )

    async def close(self) -> None:
        await self._client.aclose()


async def _notice_of_10_s(fleet: _Fleet) -> None:
    await fleet.take(1, 10.0)
    await asyncio.sleep(10.5)


async def _notice_of_2_s(fleet: _Fleet) -> None:
    await fleet.take(1, 2.0)
    await asyncio.sleep(2.5)


async def _no_notice(fleet: _Fleet) -> None:
    await fleet.take(1, 0.0)


async def _two_at_once(fleet: _Fleet) -> None:
    await fleet.take(2, 0.0)


async def _loss_during_a_migration(fleet: _Fleet) -> None:
    (first, second, *_) = await fleet.serving_instances()
    await fleet.post("preempt", {"instance": first, "grace_s": 3.0})
    await fleet.until(lambda status: any(each["state"] == "loading" for each in status["replicas"]))
    await fleet.post("preempt", {"instance": second, "grace_s": 0.0})
    await asyncio.sleep(3.5)


async def _join_during_a_drain(fleet: _Fleet) -> None:
    await fleet.take(1, 4.0)
    await fleet.post("launch", {"count": 1})
    await asyncio.sleep(4.5)


async def _false_notice(fleet: _Fleet) -> None:
    (instance, *_) = await fleet.serving_instances()
    await fleet.post("notice", {"instance": instance, "deadline_s": CLOCK.now_s() + 2.0})
    await asyncio.sleep(3.5)


async def _notice_from_two_sources(fleet: _Fleet) -> None:
    (instance, *_) = await fleet.serving_instances()
    deadline_s = (await fleet.post("preempt", {"instance": instance, "grace_s": 3.0}))["deadline_s"]
    await fleet.post("notice", {"instance": instance, "deadline_s": deadline_s, "source": "queue"})
    await asyncio.sleep(3.5)


async def _controller_killed_in_a_migration(fleet: _Fleet) -> None:
    await fleet.take(1, 4.0)
    await fleet.until(lambda status: any(each["state"] == "loading" for each in status["replicas"]))
    await asyncio.to_thread(fleet.system.kill_and_start_again)
    await asyncio.sleep(4.5)


DEEDS: dict[str, Deed] = {
    "notice of 10 s": _notice_of_10_s,
    "notice of 2 s": _notice_of_2_s,
    "no notice": _no_notice,
    "two at once": _two_at_once,
    "loss during a migration": _loss_during_a_migration,
    "join during a drain": _join_during_a_drain,
    "false notice": _false_notice,
    "notice from two sources": _notice_from_two_sources,
    "controller killed in a migration": _controller_killed_in_a_migration,
}


async def _measure(system: RunningSystem, args: argparse.Namespace, console: Console) -> dict[str, Any]:
    fleet, admin = _Fleet(system, args.instances), Admin(system.url, system.secret)
    load = Load(
        system.url,
        system.status()["model"],
        streams=args.streams,
        prompt_tokens=args.prompt_tokens,
        tokens=args.tokens,
        seed=args.seed,
    )
    running = asyncio.create_task(load.run(args.cycle), name="load")
    events: list[FleetEvent] = []
    spans: list[tuple[str, Span, Span, list[Any]]] = []
    await fleet.until_settled()
    for name in args.only or DEEDS:
        await asyncio.sleep(QUIET_S)
        quiet = Span(CLOCK.now_s() - QUIET_S, CLOCK.now_s())
        console.print(f"{name} ...")
        await DEEDS[name](fleet)
        await fleet.until_settled()
        spans.append((name, quiet, Span(quiet.end_s, CLOCK.now_s()), _shapes(await fleet.status())))
        events += await _new_events(admin)
    load.stop()
    await running
    events += await _new_events(admin)
    differing = await _ask_again(system, load)
    await fleet.close()
    await admin.close()
    return _report(load, spans, events, differing)


async def _new_events(admin: Admin) -> list[FleetEvent]:
    """A restarted controller counts its events anew."""
    return list(await admin.new_events())


def _shapes(status: dict[str, Any]) -> list[Any]:
    return sorted([each["parallel"]["pipeline"], each["parallel"]["tensor"]] for each in status["replicas"])


async def _ask_again(system: RunningSystem, load: Load) -> int:
    again = Load(system.url, system.status()["model"], streams=1, prompt_tokens=0, tokens=0, seed=0)
    whole = [record for record in load.records if record.complete]
    checked = whole[:: max(1, len(whole) // ASKED_AGAIN)][:ASKED_AGAIN]
    answers = await asyncio.gather(*(again.repeat(record.arrival) for record in checked))
    return sum(answer.token_ids != record.token_ids for answer, record in zip(answers, checked, strict=True))


def _report(load: Load, spans: list[tuple[str, Span, Span, list[Any]]], events: list[FleetEvent], differing: int) -> dict[str, Any]:
    gaps = gaps_of(load.records)
    rows = []
    for name, quiet, span, shapes in spans:
        steady = [gap.length_s for gap in gaps if not gap.is_first and quiet.overlaps(gap.start_s, gap.end_s)]
        seen = around(Preemption(name, "", span), gaps, events)
        rows.append(
            {
                "change": name,
                "took_s": span.end_s - span.start_s,
                "interrupted": seen["interrupted"],
                "longest_gap_s": seen["longest_gap_s"],
                "others_longest_gap_s": seen["bystanders_longest_gap_s"],
                "steady_p99_s": percentile(steady, 0.99) if steady else None,
                "shapes_after": shapes,
            }
        )
    return {
        "changes": rows,
        "answers": len(load.records),
        "lost": sum(not record.complete for record in load.records),
        "errors": [record.error for record in load.records if record.error is not None][:5],
        "contradicted_tokens": sum(record.contradicted_tokens for record in load.records),
        "asked_again": min(ASKED_AGAIN, len(load.records)),
        "altered": differing,
    }


def _table(report: dict[str, Any]) -> Table:
    table = Table(title=f"{report['answers']} answers, {report['lost']} lost, {report['altered']} altered")
    for column in ("change", "moved", "resumed", "longest gap", "others' longest", "steady p99", "then runs (P, M)"):
        table.add_column(column, justify="left" if column in ("change", "then runs (P, M)") else "right")
    for row in report["changes"]:
        table.add_row(
            row["change"],
            *(str(row["interrupted"].get(kind, 0)) for kind in ("moved", "resumed")),
            *(_ms(row[name]) for name in ("longest_gap_s", "others_longest_gap_s", "steady_p99_s")),
            ", ".join(f"({pipeline}, {tensor})" for pipeline, tensor in row["shapes_after"]),
        )
    return table


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:,.0f} ms"


def main() -> None:
    """Runs and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=5)
    parser.add_argument("--device-memory", type=int, default=64_000_000, help="bytes of each device, for the planner")
    parser.add_argument("--kv-tokens", type=int, default=4096, help="of each replica")
    parser.add_argument("--parallel", default="auto", help="auto: the planner chooses; or D,P,M")
    parser.add_argument("--dtype", default="float64")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--cycle", type=float, default=0.0, help="seconds between two calls of a stream; 0: no pause")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=list(DEEDS), help="these changes")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that systems are ended, as on Ctrl-C
    console = Console(stderr=True)
    started_s = time.monotonic()
    flags = ["--parallel", args.parallel, "--dtype", args.dtype, "--restock", "1", "--speculation", "off"]
    settings = {
        "SPOTSERVE_CLOUD__DEVICE_MEMORY_BYTES": str(args.device_memory),
        "SPOTSERVE_ENGINE__KV_TOKENS": str(args.kv_tokens),
        "SPOTSERVE_ENGINE__PREFIX_CACHE": "false",
    }
    with (
        tempfile.TemporaryDirectory() as home,
        running_system(Path(home), *flags, instances=args.instances, replicas=1, settings=settings) as system,
    ):
        report = asyncio.run(_measure(system, args, console))
    report |= {"machine": machine(), "took_s": time.monotonic() - started_s}
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        Console().print(_table(report))
        console.print({name: value for name, value in report.items() if name != "changes"})


if __name__ == "__main__":
    main()
