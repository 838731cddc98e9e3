"""What it costs two shards to add up: over this project's links, and over torch.distributed with gloo.

    python benchmarks/rank_links.py --json

Two processes on this machine. Per way: how long the group takes to form, and the median time of one sum of `--bytes`, both
ways in turn, round by round, on the same two processes.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from cluster import machine
from rich.console import Console
from rich.table import Table

from spotserve.core.messages import Address
from spotserve.engine.ranks.group import Group, GroupPlan, LinkedShards
from spotserve.engine.ranks.memory import RankMemory
from spotserve.engine.ranks.server import RankServer

SECRET = "of the benchmark"
JOIN_S = 30.0
ROUNDS = 7


def _median_s(add: Any, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start_s = time.perf_counter()
        add()
        times.append(time.perf_counter() - start_s)
    return statistics.median(times)


def _shard(shard: int, folder: str, pipe: Any, sizes: list[int], repeats: int) -> None:
    """One of the two processes."""
    torch.set_num_threads(1)
    server = RankServer("127.0.0.1", RankMemory(), secret=SECRET)
    server.start()
    pipe.send((server.address.host, server.address.port))
    addresses = {(0, place): Address(*address) for place, address in enumerate(pipe.recv())}
    start_s = time.perf_counter()
    group = Group(GroupPlan("bench", pipeline=1, tensor=2, place=(0, shard), leads=shard == 0, addresses=addresses))
    server.expect(group)
    group.join(secret=SECRET, deadline_s=time.monotonic() + JOIN_S)
    formed = {"links": time.perf_counter() - start_s}
    shards = LinkedShards(group)
    start_s = time.perf_counter()
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=shard, world_size=2)
    torch.distributed.barrier()
    formed["gloo"] = time.perf_counter() - start_s
    sums: dict[str, dict[str, float]] = {"links": {}, "gloo": {}}
    for size in sizes:
        part = torch.ones(size // 4)
        ways = {"links": lambda part=part: shards.sum(part), "gloo": lambda part=part: torch.distributed.all_reduce(part)}
        rounds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, add in ways.items():
                torch.distributed.barrier()
                rounds[name].append(_median_s(add, repeats))
        for name, of_way in rounds.items():
            sums[name][str(size)] = statistics.median(of_way)
    torch.distributed.destroy_process_group()
    group.break_off("the benchmark is over")
    server.close()
    pipe.send({"formed_s": formed, "sum_s": sums})


def main() -> None:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, nargs="+", default=[4096, 16384, 262144, 4194304])
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ends = [context.Pipe() for _ in range(2)]
        shards = [
            context.Process(target=_shard, args=(shard, str(Path(folder)), theirs, args.bytes, args.repeats))
            for shard, (_, theirs) in enumerate(ends)
        ]
        for process in shards:
            process.start()
        addresses = [ours.recv() for ours, _ in ends]
        for ours, _ in ends:
            ours.send(addresses)
        reports = [ours.recv() for ours, _ in ends]
        for process in shards:
            process.join()
    report: dict[str, Any] = {**reports[0], "machine": machine()}
    if args.json:
        print(json.dumps(report, indent=2))
        return
    table = Table("", *(f"{size:,} bytes" for size in args.bytes), "forming a group", title="one sum over two shards")
    for name in ("links", "gloo"):
        times = [f"{1e6 * report['sum_s'][name][str(size)]:,.0f} us" for size in args.bytes]
        table.add_row(name, *times, f"{1e3 * report['formed_s'][name]:.1f} ms")
    Console().print(table)


if __name__ == "__main__":
    main()
