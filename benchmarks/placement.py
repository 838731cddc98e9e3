"""What placing costs as the fleet grows, and how far keeping stages on one instance is from the best of all assignments.

    python benchmarks/placement.py
    python benchmarks/placement.py --instances 100 1000 --json

Instances of four devices hold replicas of one shape, with KV of a different number of tokens in each replica; one instance in 37 is
lost, and the rest is placed anew in another shape. Times: counting bytes (`scores_of`), two levels without and with the
choice of the smallest busiest port (`place`), and flat Kuhn-Munkres (`place_freely`), left out above `--flat` instances. Shares:
bytes reused of those that the flat matching reuses. At the end: one replica that lost its instances, and few free devices.
"""

import argparse
import json
import time
from itertools import pairwise
from statistics import median
from typing import Any

from migrations import decoder
from rich.console import Console
from rich.table import Table

from spotserve.core.cluster import DeviceId
from spotserve.core.messages import HeldSlot
from spotserve.core.plan import Parallel, Placement, ReplicaPlan
from spotserve.migration.matching import place, place_freely
from spotserve.migration.scores import Contents, Scores, scores_of

MODEL = decoder(layers=44, hidden=6144, heads=48, kv_heads=48, vocabulary=51_200, value_bytes=4)
CHANGES = (((2, 8), (3, 4)), ((3, 4), (2, 8)), ((2, 4), (2, 2)), ((4, 1), (2, 2)))
DEVICES = 4


def fleet(count: int, shape: tuple[int, int]) -> dict[DeviceId, Contents]:
    """Replicas of P x M on `count` instances, one after the other."""
    devices = iter([DeviceId(f"i-{instance:05}", index) for instance in range(count) for index in range(DEVICES)])
    parallel = Parallel(pipeline=shape[0], tensor=shape[1])
    contents = {}
    for number in range(count * DEVICES // parallel.num_slots):
        for slot in ReplicaPlan(replica_id=f"o-{number:05}", parallel=parallel).slots:
            device = next(devices)
            held = HeldSlot(device.index, slot, parallel)
            contents[device] = Contents((held,), ((held, 1000 + number),))
    return contents


def reused(scores: Scores, placement: Placement) -> int:
    """Bytes that an assignment finds in place."""
    row = {slot: place for place, slot in enumerate(scores.slots)}
    column = {device: place for place, device in enumerate(scores.devices)}
    pairs = placement.devices.items()
    return sum(int(scores.found_bytes[scores.kinds[row[slot]], column[device]]) for slot, device in pairs)


def anew(count: int, old: tuple[int, int], new: tuple[int, int], *, flat: bool) -> dict[str, Any]:
    """A whole fleet placed in another shape."""
    contents = fleet(count, old)
    lost = {f"i-{index:05}" for index in range(0, count, 37)}
    free = [device for device in contents if device.instance_id not in lost]
    parallel = Parallel(pipeline=new[0], tensor=new[1])
    replicas = [ReplicaPlan(replica_id=f"r-{index:05}", parallel=parallel) for index in range(len(free) // parallel.num_slots)]
    marks = [time.perf_counter()]
    scores = scores_of(MODEL, replicas, free, contents)
    marks.append(time.perf_counter())
    made = [place(scores, nearly=0)]
    marks.append(time.perf_counter())
    made.append(place(scores))
    marks.append(time.perf_counter())
    if flat:
        made.append(place_freely(scores))
        marks.append(time.perf_counter())
    seconds = [after - before for before, after in pairwise(marks)]
    best = reused(scores, made[-1]) if flat else None
    return {
        "instances": count,
        "change": f"{old} -> {new}",
        "scores_s": seconds[0],
        "place_s": seconds[1],
        "place_sooner_s": seconds[2],
        "flat_s": seconds[3] if flat else None,
        "share_of_flat": reused(scores, made[1]) / best if best else None,
    }


def one_replica(count: int) -> dict[str, Any]:
    """A replica of (2, 8) has lost its instances; it goes to one spare instance and three others that are free."""
    contents = fleet(count, (2, 8))
    free = [*list(contents)[: 3 * DEVICES], *(DeviceId("j-1", index) for index in range(DEVICES))]
    replicas = [ReplicaPlan(replica_id="r-1", parallel=Parallel(pipeline=2, tensor=8))]
    seconds = []
    for _ in range(9):
        began_s = time.perf_counter()
        place(scores_of(MODEL, replicas, free, contents))
        seconds.append(time.perf_counter() - began_s)
    return {"instances": count, "median_ms": 1e3 * median(seconds), "first_ms": 1e3 * seconds[0]}


def show(answer: dict[str, Any], console: Console) -> None:
    """Prints what was found."""
    table = Table("instances", "(P,M) -> (P,M)", "scores s", "place s", "sooner s", "flat s", "bytes of flat")
    for row in answer["anew"]:
        flat = ("-", "-") if row["flat_s"] is None else (f"{row['flat_s']:.3f}", f"{100 * row['share_of_flat']:.1f} %")
        seconds = (f"{row[key]:.3f}" for key in ("scores_s", "place_s", "place_sooner_s"))
        table.add_row(f"{row['instances']:,}", row["change"], *seconds, *flat)
    console.print(table)
    for row in answer["one_replica"]:
        told = f"{row['median_ms']:.1f} ms, {row['first_ms']:.1f} the first time"
        console.print(f"{row['instances']:,} instances, one replica placed anew: {told}")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, nargs="*", default=[16, 100, 1000])
    parser.add_argument("--flat", type=int, default=100, help="the largest fleet that flat matching is tried on")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    answer = {
        "anew": [anew(count, old, new, flat=count <= options.flat) for count in options.instances for old, new in CHANGES],
        "one_replica": [one_replica(count) for count in options.instances],
    }
    if options.json:
        print(json.dumps(answer, indent=1))
    else:
        show(answer, Console(width=140))


if __name__ == "__main__":
    main()
