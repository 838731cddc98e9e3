"""Cutting a model anew while it answers, against stopping and starting it in the new shape.

    python benchmarks/recut.py --json

`--streams` clients call a local system without a pause. In one run the system goes through `--shapes` (D,P,M, one after the
other) twice: first by `reshape`, then by being stopped and started again. Per change by reshape: the longest gap between two
token events of any one stream, from the command until every replica has the new shape and nothing is left of the old one;
bytes of weights planned and moved. Per restart: how long nobody at all got a token, which favours the restart: every stream
waits longer than that. At the end some answers are asked for again of an undisturbed system: none may differ.
"""

import argparse
import asyncio
import json
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
from cluster import RunningSystem, free_port, machine, percentile, running_system
from gap_figures import Span, gaps_of
from load import CLOCK, Load
from rich.console import Console
from rich.table import Table

from spotserve.replay.record import RequestRecord

Shape = tuple[int, int, int]
CHANGE_S = 60.0
SETTLE_S = 3.0
"""Between two changes, and before the first."""
ASKED_AGAIN = 60


def _shape(text: str) -> Shape:
    data, pipeline, tensor = (int(part) for part in text.split(","))
    return data, pipeline, tensor


def _is_in(status: dict[str, Any], shape: Shape) -> bool:
    """Whether the system serves in this shape and in no other."""
    replicas = status["replicas"]
    return len(replicas) == shape[0] and all(
        replica["state"] == "serving" and (replica["parallel"]["pipeline"], replica["parallel"]["tensor"]) == shape[1:]
        for replica in replicas
    )


async def _until_in(system: RunningSystem, shape: Shape) -> None:
    async with asyncio.timeout(CHANGE_S), httpx.AsyncClient(timeout=10) as client:
        while not _is_in((await client.get(f"{system.url}/status")).json(), shape):
            await asyncio.sleep(0.02)


async def _reshape(system: RunningSystem, shape: Shape) -> dict[str, Any]:
    """Commands a shape and waits for it; what the controller says of the migration."""
    body = dict(zip(("data", "pipeline", "tensor"), shape, strict=True))
    async with httpx.AsyncClient(timeout=10) as client:
        answer = await client.post(f"{system.url}/admin/reshape", json=body, headers={"authorization": f"Bearer {system.secret}"})
        answer.raise_for_status()
        await _until_in(system, shape)
        migration: dict[str, Any] = (await client.get(f"{system.url}/status")).json()["migrations"][-1]
    return migration


def _longest_gap_s(records: list[RequestRecord], span: Span) -> float:
    return max(gap.length_s for gap in gaps_of(records) if not gap.is_first and span.overlaps(gap.start_s, gap.end_s))


def _silence_s(records: list[RequestRecord], span: Span) -> float:
    """The longest time within a stretch in which no stream got a token."""
    times_s = sorted(at_s for record in records for at_s in record.event_times_s if span.start_s <= at_s <= span.end_s)
    return max(later - earlier for earlier, later in pairwise([span.start_s, *times_s, span.end_s]))


class _Run:
    """One run: the load, and what the changes did to it."""

    def __init__(self, home: Path, args: argparse.Namespace, console: Console) -> None:
        self._home, self._args, self._console = home, args, console
        self._port = free_port()
        self._shapes = [_shape(text) for text in args.shapes.split()]
        self._recut: list[tuple[Span, dict[str, Any]]] = []
        self._restart: list[Span] = []

    def _system(self, shape: Shape) -> Any:
        return running_system(
            self._home,
            "--parallel",
            ",".join(map(str, shape)),
            instances=self._args.instances,
            replicas=shape[0],
            port=self._port,
        )

    async def measure(self) -> dict[str, Any]:
        """The whole run."""
        load: Load | None = None
        running: asyncio.Task[None] | None = None
        with self._system(self._shapes[0]) as system:
            args = self._args
            load = Load(
                system.url,
                system.status()["model"],
                streams=args.streams,
                prompt_tokens=args.prompt_tokens,
                tokens=args.tokens,
                seed=args.seed,
            )
            running = asyncio.create_task(load.run(0.0), name="load")
            await asyncio.sleep(2 * SETTLE_S)
            steady = Span(CLOCK.now_s() - SETTLE_S, CLOCK.now_s())
            for shape in self._shapes[1:]:
                self._console.print(f"re-cut to {shape}")
                start_s = CLOCK.now_s()
                migration = await _reshape(system, shape)
                self._recut.append((Span(start_s, CLOCK.now_s()), migration))
                await asyncio.sleep(SETTLE_S)
            last = await asyncio.to_thread(self._timed_stop, system)
        for shape in self._shapes[1:]:
            self._console.print(f"restart as {shape}")
            entered = self._system(shape)
            system = await asyncio.to_thread(entered.__enter__)
            try:
                await _until_in(system, shape)
                await asyncio.sleep(SETTLE_S)
                self._restart.append(Span(last, CLOCK.now_s()))
                is_last = len(self._restart) == len(self._shapes) - 1
                if is_last:
                    load.stop()
                    await running
                    differing = await self._ask_again(system, load.records)
                last = CLOCK.now_s()
            finally:
                await asyncio.to_thread(entered.__exit__, None, None, None)
        return self._report(load.records, steady, differing)

    def _timed_stop(self, system: RunningSystem) -> float:
        now_s = CLOCK.now_s()
        system.stop()
        return now_s

    async def _ask_again(self, system: RunningSystem, records: list[RequestRecord]) -> int:
        """Answers that are not what an undisturbed system says."""
        again = Load(system.url, system.status()["model"], streams=1, prompt_tokens=0, tokens=0, seed=0)
        checked = [record for record in records if record.complete][-ASKED_AGAIN:]
        answers = [await again.repeat(record.arrival) for record in checked]
        return sum(answer.token_ids != record.token_ids for answer, record in zip(answers, checked, strict=True))

    def _report(self, records: list[RequestRecord], steady: Span, differing: int) -> dict[str, Any]:
        names = [f"{before} -> {after}" for before, after in pairwise(self._shapes)]
        changes = []
        for name, (span, migration), restart in zip(names, self._recut, self._restart, strict=True):
            recut_s, restart_s = _longest_gap_s(records, span), _silence_s(records, restart)
            changes.append(
                {
                    "change": name,
                    "recut_longest_gap_s": recut_s,
                    "restart_silence_s": restart_s,
                    "ratio": restart_s / recut_s,
                    "planned_bytes": migration["planned_bytes"],
                    "moved_bytes": migration["moved_bytes"],
                    "kv_bytes": migration["kv_bytes"],
                    "recut_s": span.end_s - span.start_s,
                }
            )
        quiet = [gap.length_s for gap in gaps_of(records) if not gap.is_first and steady.overlaps(gap.start_s, gap.end_s)]
        return {
            "changes": changes,
            "median_ratio": sorted(change["ratio"] for change in changes)[len(changes) // 2],
            "least_ratio": min(change["ratio"] for change in changes),
            "steady_gap_p50_s": percentile(quiet, 0.5),
            "steady_gap_p99_s": percentile(quiet, 0.99),
            "answers": len(records),
            "not_whole_in_recuts": sum(not r.complete for r in records if r.sent_s < self._recut[-1][0].end_s - SETTLE_S),
            "contradicted_tokens": sum(record.contradicted_tokens for record in records),
            "asked_again": min(ASKED_AGAIN, len(records)),
            "differing": differing,
        }


def _table(report: dict[str, Any]) -> Table:
    table = Table(title="re-cut: longest gap of any stream; restart: how long all were silent")
    for column in ("change", "re-cut", "restart", "ratio", "weights planned", "moved", "KV moved"):
        table.add_column(column, justify="left" if column == "change" else "right")
    for change in report["changes"]:
        table.add_row(
            change["change"],
            f"{1e3 * change['recut_longest_gap_s']:.0f} ms",
            f"{change['restart_silence_s']:.1f} s",
            f"{change['ratio']:.0f} x",
            *(f"{change[name] / 1e6:.1f} MB" for name in ("planned_bytes", "moved_bytes", "kv_bytes")),
        )
    return table


def main() -> None:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="2,1,1 1,2,1 1,1,2 2,1,1 1,3,1 2,1,1", help="D,P,M one after the other")
    parser.add_argument("--instances", type=int, default=3)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    args = parser.parse_args()
    console = Console(stderr=True)
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory() as home:
        report = asyncio.run(_Run(Path(home), args, console).measure())
    report |= {"machine": machine(), "took_s": time.monotonic() - started_s}
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        console.print(_table(report))
        console.print({name: value for name, value in report.items() if name != "changes"})


if __name__ == "__main__":
    main()
