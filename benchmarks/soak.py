"""Many short requests, cancels, evictions, prefix hits and re-cuts: what is left behind when all is over, if anything.

    python benchmarks/soak.py --requests 10000 --json

A local system serves `--requests` calls from `--streams` clients. Prompts share beginnings (prefix hits), one call in
`--cancel-every` leaves in the middle of its answer, the KV cache holds too little for everybody (evictions), and every
`--reshape-every` seconds the model is cut anew into the next of `--shapes`. Memory is that of all processes, their private
pages, after each quarter of the calls, in the first shape and idle; `growth` is that of the last quarter: before that,
allocators and the compiled code of matrix products find their size. Engines check their books whenever they run dry; one that
does not balance would end its worker, and be seen here.
"""

import argparse
import asyncio
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from cluster import RunningSystem, machine, running_system
from rich.console import Console
from rich.progress import Progress

from spotserve.replay.prompts import build_prompt

IDLE_S = 4.0
CHANGE_S = 60.0
SHARED_TOKENS = 96


def _private_bytes(pid: int) -> int:
    """Memory of a process that it shares with nobody."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Private_Clean", "Private_Dirty")))


class _Soak:
    """One run."""

    def __init__(self, system: RunningSystem, args: argparse.Namespace, progress: Progress) -> None:
        self._system, self._args, self._progress = system, args, progress
        self._choose = random.Random(args.seed)
        self._client = httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=2 * args.streams))
        self._task = progress.add_task("requests", total=args.requests)
        self._sent = 0
        self._shapes = [tuple(int(part) for part in text.split(",")) for text in args.shapes.split()]
        self.counts = {"finished": 0, "cancelled": 0, "failed": 0, "reshapes": 0}
        self.failures: list[str] = []

    async def serve(self, until: int) -> None:
        """Calls up to number `until`."""
        async with asyncio.TaskGroup() as group:
            for _ in range(self._args.streams):
                group.create_task(self._stream(until))

    async def _stream(self, until: int) -> None:
        while self._sent < until:
            self._sent += 1
            await self._call(self._sent)
            self._progress.advance(self._task)

    async def _call(self, number: int) -> None:
        leaves = number % self._args.cancel_every == 0
        prompt = build_prompt(SHARED_TOKENS, number % 7) + build_prompt(self._choose.randint(4, 40), number)
        body = {
            "model": "spotserve-demo",
            "prompt": prompt,
            "max_tokens": 400 if leaves else self._choose.randint(1, 32),
            "temperature": float(number % 2),
            "seed": number,
            "ignore_eos": True,
            "stream": True,
        }
        try:
            async with self._client.stream("POST", f"{self._system.url}/v1/completions", json=body) as answer:
                answer.raise_for_status()
                done = False
                async for line in answer.aiter_lines():
                    if leaves and line.startswith("data: {"):
                        break
                    done = done or line == "data: [DONE]"
                    if line.startswith('data: {"error"'):
                        raise httpx.HTTPError(line)
                self.counts["cancelled" if leaves else "finished" if done else "failed"] += 1
        except httpx.HTTPError as error:
            self.counts["failed"] += 1
            self.failures.append(f"{type(error).__name__}: {error}"[:300])

    async def reshape_forever(self) -> None:
        """The next shape every so often."""
        number = 0
        while True:
            await asyncio.sleep(self._args.reshape_every)
            number += 1
            await self.reshape(self._shapes[number % len(self._shapes)])
            self.counts["reshapes"] += 1

    async def reshape(self, shape: tuple[int, ...]) -> None:
        """Cuts anew, and waits until that is done."""
        answer = await self._client.post(
            f"{self._system.url}/admin/reshape",
            json=dict(zip(("data", "pipeline", "tensor"), shape, strict=True)),
            headers={"authorization": f"Bearer {self._system.secret}"},
        )
        answer.raise_for_status()
        async with asyncio.timeout(CHANGE_S):
            while True:
                replicas = (await self._client.get(f"{self._system.url}/status")).json()["replicas"]
                shapes = [(item["parallel"]["pipeline"], item["parallel"]["tensor"]) for item in replicas]
                if len(replicas) == shape[0] and set(shapes) == {shape[1:]} and all(r["state"] == "serving" for r in replicas):
                    return
                await asyncio.sleep(0.05)

    async def idle_bytes(self) -> int:
        """Private memory of all processes, in the first shape, with nothing to do."""
        await self.reshape(self._shapes[0])
        await asyncio.sleep(self._args.detach_grace + IDLE_S)
        status = self._system.status()
        pids = [self._system.pid, *(item["pid"] for item in status["instances"] if item["pid"])]
        return sum(_private_bytes(pid) for pid in pids)

    async def close(self) -> None:
        """Hangs up."""
        await self._client.aclose()


async def _with_reshapes(soak: _Soak, until: int) -> None:
    reshaping = asyncio.create_task(soak.reshape_forever(), name="reshapes")
    serving = asyncio.create_task(soak.serve(until), name="requests")
    done, _ = await asyncio.wait([reshaping, serving], return_when=asyncio.FIRST_COMPLETED)
    reshaping.cancel()
    for task in done:
        task.result()
    await serving


async def _measure(system: RunningSystem, args: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    soak = _Soak(system, args, progress)
    workers = {item["id"] for item in system.status()["instances"]}
    private_mb = []
    for quarter in range(1, 5):
        await _with_reshapes(soak, quarter * args.requests // 4)
        private_mb.append(await soak.idle_bytes() / 1e6)
    status = system.status()
    metrics = httpx.get(f"{system.url}/metrics", timeout=10).text
    await soak.close()
    values = {line.split()[0]: float(line.split()[1]) for line in metrics.splitlines() if line and not line.startswith("#")}
    return {
        **soak.counts,
        "failures": soak.failures[:5],
        "kv_tokens_used_at_end": status["kv"]["tokens_used"],
        "requests_at_end": status["requests"],
        "workers_replaced": len({item["id"] for item in status["instances"]} - workers),
        "prefix_cached_tokens": values["spotserve_prefix_cached_tokens_total"],
        "tokens_recomputed": values["spotserve_tokens_recomputed_total"],
        "kv_moved_bytes": values["spotserve_kv_moved_bytes_total"],
        "private_mb": private_mb,
        "growth": private_mb[-1] / private_mb[-2] - 1,
    }


def main() -> None:
    """Runs it; exit code 1 when something was left behind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--streams", type=int, default=24)
    parser.add_argument("--cancel-every", type=int, default=10)
    parser.add_argument("--reshape-every", type=float, default=10.0)
    parser.add_argument("--shapes", default="2,1,1 1,2,1 1,1,2 1,3,1", help="D,P,M one after the other, and again")
    parser.add_argument(
        "--kv-tokens", type=int, default=2048, help="of each replica: too few for everybody, so that some are evicted"
    )
    parser.add_argument("--detach-grace", type=float, default=1.0, help="how long a request goes on after its client has left")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    args = parser.parse_args()
    console = Console(stderr=True)
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory() as home:
        config = Path(home) / "soak.toml"
        config.write_text(f"[engine]\nkv_tokens = {args.kv_tokens}\n[gateway]\ndetach_grace_s = {args.detach_grace}\n")
        shape = args.shapes.split()[0]
        data = int(shape.split(",")[0])
        with (
            running_system(Path(home), "--parallel", shape, "--config", str(config), instances=3, replicas=data) as system,
            Progress(console=console) as progress,
        ):
            report = asyncio.run(_measure(system, args, progress))
    report |= {"machine": machine(), "took_s": time.monotonic() - started_s}
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        console.print(report)
    clean = report["kv_tokens_used_at_end"] == 0 and not report["failed"] and not report["workers_replaced"]
    raise SystemExit(0 if clean and abs(report["growth"]) <= 0.02 else 1)


if __name__ == "__main__":
    main()
