"""What checkpointing costs: tokens per second of a whole system with its progress store off, in SQLite and in Redis.

    python benchmarks/checkpoint_cost.py --instances 1 --rounds 8 --json

One system per store is up; one at a time is loaded. A round loads each once, in an order of its own, with the same prompts:
`--streams` clients, `--calls` calls each, greedy, exactly `--tokens` tokens per call. Ratios compare within a round, so what
slows the machine for a while slows both sides. `none again` is the first system measured twice: its spread around 1 is what
this machine can tell apart. Processor time per token counts gateway, workers and Redis, and is steadier than wall time.

A Redis server is started for the run; without a `redis-server` on the path that row is left out.
"""

import argparse
import asyncio
import json
import random
import signal
import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
from cluster import RedisServer, RunningSystem, machine, redis_server, running_system
from rich.console import Console
from rich.progress import Progress
from rich.table import Column, Table

from spotserve.replay.event_stream import read_body, read_head
from spotserve.replay.prompts import build_prompt

BASELINE = "none"
CONTROL = "none again"
GOALS = {"redis": 0.98, "sqlite": 0.95}
PROMPT_TOKENS = 32
PATIENCE_S = 600.0


@dataclass(frozen=True, slots=True)
class Contender:
    """A system with one store."""

    name: str
    system: RunningSystem
    redis: RedisServer | None
    """The server of its store, when that is Redis."""

    def cpu_s(self) -> float:
        """Processor seconds used so far by everything that serves."""
        return self.system.cpu_s() + (self.redis.cpu_s() if self.redis is not None else 0.0)


@dataclass(frozen=True, slots=True)
class Measurement:
    """One contender in one round."""

    tokens_per_s: float
    cpu_us_per_token: float


async def _complete(url: str, body: bytes) -> int:
    """Streams one completion to its end, parsing nothing but the last part; its output tokens."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        status, headers = await read_head(reader)
        tail = b""
        async for piece in read_body(reader, headers):
            tail = (tail + piece)[-4096:]
    finally:
        writer.close()
    events = [block.partition(b"data: ")[2] for block in tail.split(b"\n\n")]
    if status != 200 or events[-2:-1] != [b"[DONE]"]:
        raise RuntimeError(f"{url} answered {status}, ending in {tail[-300:]!r}")
    return int(json.loads(events[-3])["usage"]["completion_tokens"])


async def _load(system: RunningSystem, bodies: list[list[bytes]]) -> int:
    """One client per list, each sending its calls one after the other; output tokens of all."""

    async def client(calls: list[bytes]) -> int:
        return sum([await _complete(system.url, body) for body in calls])

    async with asyncio.timeout(PATIENCE_S):
        return sum(await asyncio.gather(*map(client, bodies)))


def _bodies(model: str, args: argparse.Namespace, seed: int) -> list[list[bytes]]:
    """The calls of one round, `streams` lists of `calls`; no prompt comes twice in a run."""
    numbers = iter(range(args.streams * args.calls))
    return [[_body(model, args.tokens, seed * 1_000_003 + next(numbers)) for _ in range(args.calls)] for _ in range(args.streams)]


def _body(model: str, tokens: int, seed: int) -> bytes:
    return msgspec.json.encode(
        {
            "model": model,
            "prompt": build_prompt(PROMPT_TOKENS, seed),
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    )


def _measure(contender: Contender, bodies: list[list[bytes]], expected_tokens: int) -> Measurement:
    cpu_s, started_s = contender.cpu_s(), time.perf_counter()
    tokens = asyncio.run(_load(contender.system, bodies))
    took_s = time.perf_counter() - started_s
    assert tokens == expected_tokens, f"{contender.name} made {tokens} tokens, {expected_tokens} were asked for"
    return Measurement(tokens_per_s=tokens / took_s, cpu_us_per_token=(contender.cpu_s() - cpu_s) / tokens * 1e6)


def _rounds(contenders: list[Contender], args: argparse.Namespace, progress: Progress) -> dict[str, list[Measurement]]:
    """Every contender once per round, in random order; the first `--warmup` rounds are thrown away."""
    model = contenders[0].system.status()["model"]
    choose = random.Random(args.seed)
    kept: dict[str, list[Measurement]] = {contender.name: [] for contender in contenders}
    task = progress.add_task("measuring", total=(args.warmup + args.rounds) * len(contenders))
    for number in range(args.warmup + args.rounds):
        bodies = _bodies(model, args, args.seed * 10_007 + number)
        for contender in choose.sample(contenders, len(contenders)):
            label = f"round {number - args.warmup + 1}/{args.rounds}" if number >= args.warmup else "warming up"
            progress.update(task, description=f"{label}: {contender.name}")
            measurement = _measure(contender, bodies, args.streams * args.calls * args.tokens)
            if number >= args.warmup:
                kept[contender.name].append(measurement)
            progress.advance(task)
    return kept


def _report(kept: dict[str, list[Measurement]]) -> dict[str, dict[str, object]]:
    """Per store: medians, and ratios to the baseline of the same round."""
    return {name: _row(name, measurements, kept[BASELINE]) for name, measurements in kept.items()}


def _row(name: str, measurements: list[Measurement], baseline: list[Measurement]) -> dict[str, object]:
    ratios = [mine.tokens_per_s / base.tokens_per_s for mine, base in zip(measurements, baseline, strict=True)]
    cpu_ratios = [mine.cpu_us_per_token / base.cpu_us_per_token for mine, base in zip(measurements, baseline, strict=True)]
    return {
        "tokens_per_s": round(statistics.median(mine.tokens_per_s for mine in measurements), 1),
        "ratio": round(statistics.median(ratios), 4),
        "ratio_min": round(min(ratios), 4),
        "ratio_max": round(max(ratios), 4),
        "goal": GOALS.get(name),
        "cpu_us_per_token": round(statistics.median(mine.cpu_us_per_token for mine in measurements), 1),
        "cpu_ratio": round(statistics.median(cpu_ratios), 4),
        "rounds_tokens_per_s": [round(mine.tokens_per_s, 1) for mine in measurements],
    }


def _table(stores: dict[str, dict[str, object]], title: str) -> Table:
    table = Table(Column("store", no_wrap=True), title=title)
    for heading in ("tokens/s", "ratio", "min", "max", "goal", "CPU µs/token", "CPU ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    keys = ("tokens_per_s", "ratio", "ratio_min", "ratio_max", "goal", "cpu_us_per_token", "cpu_ratio")
    for name, row in stores.items():
        cells = ["" if row[key] is None else f"{'>= ' if key == 'goal' else ''}{row[key]}" for key in keys]
        table.add_row(name, *cells)
    return table


def _start(args: argparse.Namespace, folder: Path, at_end: ExitStack, console: Console) -> list[Contender]:
    """One system per store, all of them serving."""
    redis = at_end.enter_context(redis_server(folder))
    urls = {BASELINE: "none", "sqlite": f"sqlite:///{folder}/progress.sqlite"}
    if redis is None:
        console.print("no redis-server on the path: that row is left out")
    else:
        urls["redis"] = redis.url
    contenders = []
    for name, url in urls.items():
        with console.status(f"starting a system with store {url}"):
            flags = ("--store", url, "--speculation", args.speculation)
            system = at_end.enter_context(running_system(folder / name, *flags, instances=args.instances))
        contenders.append(Contender(name, system, redis if name == "redis" else None))
    return [*contenders, Contender(CONTROL, contenders[0].system, None)]


def main() -> None:
    """Runs and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=1, help="of each system")
    parser.add_argument("--rounds", type=int, default=8, help="measured rounds")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before measuring")
    parser.add_argument("--streams", type=int, default=16, help="clients at once")
    parser.add_argument("--calls", type=int, default=4, help="calls per client and round")
    parser.add_argument("--tokens", type=int, default=128, help="output tokens per call")
    parser.add_argument("--speculation", default="off", help="as for `spotserve up`; off: one commit row per token")
    parser.add_argument("--seed", type=int, default=0, help="chooses prompts and orders")
    parser.add_argument("--folder", type=Path, help="where the stores' files go (default: a temporary folder)")
    parser.add_argument("--out", type=Path, help="write the JSON to this file, too")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that systems are ended, as on Ctrl-C
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder, ExitStack() as at_end:
        measured_on = machine()
        contenders = _start(args, Path(folder), at_end, console)
        with Progress(console=console) as progress:
            stores = _report(_rounds(contenders, args, progress))
    settings = {name: getattr(args, name) for name in ("instances", "rounds", "streams", "calls", "tokens", "speculation", "seed")}
    document = json.dumps({"benchmark": "checkpoint_cost", "machine": measured_on, "settings": settings, "stores": stores})
    if args.out is not None:
        args.out.write_text(document + "\n")
    if args.json:
        print(document)
    else:
        title = f"{args.streams} streams, {args.tokens} tokens per call, {args.instances} instances, {args.rounds} rounds"
        Console().print(_table(stores, title))


if __name__ == "__main__":
    main()
