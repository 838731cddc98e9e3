"""How fast progress is committed: batches as a worker sends them once per engine step, to SQLite and to Redis, in one run.

    python benchmarks/store_commit.py --writers 4 --json

Each writer is a process with a store of its own; all begin together. Besides time per batch the table shows the time for
which the writer's own thread of Python computes per batch: what a commit takes away from the engine beside it.
A Redis server is started for the run unless `--redis-url` names one.
"""

import argparse
import asyncio
import json
import multiprocessing
import statistics
import tempfile
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path

from cluster import redis_server

from spotserve.checkpoint.open import open_store
from spotserve.checkpoint.store import Commit, Verdict
from spotserve.config import StoreSettings


async def _write(url: str, name: str, args: argparse.Namespace, start: Barrier) -> dict[str, list[float]]:
    store = open_store(StoreSettings(url=url, timeout_s=60), Path("unused"))
    wall_s, cpu_s = [], []
    tokens = tuple(range(args.tokens))
    await store.ping()
    start.wait()
    for step in range(args.warmup + args.batches):
        generation, inner = divmod(step, args.steps_per_request)  # requests end and others begin
        batch = [
            Commit(request_id=f"{name}-{generation}-{row}", epoch=1, position=inner * args.tokens, token_ids=tokens)
            for row in range(args.rows)
        ]
        wall, cpu = time.perf_counter(), time.process_time()
        outcomes = await store.commit(batch)
        if step >= args.warmup:
            wall_s.append(time.perf_counter() - wall)
            cpu_s.append(time.process_time() - cpu)
        assert all(outcome.verdict is Verdict.OK for outcome in outcomes)
    await store.close()
    return {"wall_s": wall_s, "cpu_s": cpu_s}


def _writer(
    url: str, name: str, args: argparse.Namespace, start: Barrier, results: "multiprocessing.Queue[dict[str, list[float]]]"
) -> None:
    results.put(asyncio.run(_write(url, name, args, start)))


def _measure(url: str, args: argparse.Namespace) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(args.writers), context.Queue()
    writers = [context.Process(target=_writer, args=(url, f"w{index}", args, start, results)) for index in range(args.writers)]
    for writer in writers:
        writer.start()
    answers = [results.get() for _ in writers]
    for writer in writers:
        writer.join()
    wall_s = sorted(second for answer in answers for second in answer["wall_s"])
    cpu_s = [second for answer in answers for second in answer["cpu_s"]]
    slowest_s = max(sum(answer["wall_s"]) for answer in answers)
    return {
        "rows_per_s": round(len(wall_s) * args.rows / slowest_s),
        "p50_ms": round(statistics.median(wall_s) * 1e3, 3),
        "p99_ms": round(wall_s[min(len(wall_s) - 1, int(len(wall_s) * 0.99))] * 1e3, 3),
        "cpu_ms": round(statistics.mean(cpu_s) * 1e3, 3),
    }


def main() -> None:
    """Runs and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64, help="requests in a batch")
    parser.add_argument("--tokens", type=int, default=1, help="new tokens per request and batch")
    parser.add_argument("--batches", type=int, default=300, help="measured batches per writer")
    parser.add_argument("--warmup", type=int, default=20, help="batches before measuring")
    parser.add_argument("--steps-per-request", type=int, default=256, help="batches until new requests take the place of the old")
    parser.add_argument("--writers", type=int, default=1, help="processes that write at once")
    parser.add_argument("--folder", type=Path, help="where the files go (default: a temporary folder)")
    parser.add_argument("--redis-url", help="a running server; default: start one")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder, redis_server(Path(folder)) as redis:
        redis_url = args.redis_url or (redis.url if redis is not None else None)
        urls = {"sqlite": f"sqlite:///{folder}/progress.db", "redis": redis_url}
        rows = {name: _measure(url, args) for name, url in urls.items() if url is not None}
    if args.json:
        print(json.dumps({"rows": args.rows, "tokens": args.tokens, "writers": args.writers, "stores": rows}))
        return
    print(f"batches of {args.rows} rows, {args.tokens} new tokens each, {args.writers} writers")
    for name, row in rows.items():
        print(f"{name:8}" + "  ".join(f"{key} {value:>9}" for key, value in row.items()))


if __name__ == "__main__":
    main()
