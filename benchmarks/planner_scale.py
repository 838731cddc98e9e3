"""How long a full plan takes, from 8 to 10,000 instances: whether what it costs grows with the fleet.

    python benchmarks/planner_scale.py --json

Processor time of one process, one core. For every size the free devices are so many instances of `--instance` in `--zones` zones
whose prices differ by a per cent each, the workload is `--rate` requests per second and instance, and the plan is searched for from
nothing, once with limits on TTFT and TPOT (least dollars) and once without (shortest time). Per size and kind: the median of
`--rounds` full plans, the part of it that the queueing model takes, the fleets that it judged, and what was found. The very first
plan is not counted; what replicas make of the requests is worked out anew for every plan.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

from rich.console import Console
from rich.table import Table

from spotserve.planner import judge
from spotserve.planner.cost import replica_cost
from spotserve.planner.devices import instance_type, price_usd_per_hour
from spotserve.planner.models import named_model
from spotserve.planner.pace import pace
from spotserve.planner.search import Pool, SearchResult, search
from spotserve.planner.workload import Latency, Lengths, Objective, Workload

SIZES = (8, 16, 32, 64, 125, 250, 500, 1000, 2500, 5000, 10_000)
PROMPT = Lengths(((0.0, 100.0), (0.5, 400.0), (1.0, 2000.0)))
OUTPUT = Lengths(((0.0, 10.0), (0.5, 200.0), (1.0, 600.0)))


@dataclass
class Judged:
    """What the queueing model was asked and how long it took."""

    calls: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Row:
    """One size, planned one way."""

    instances: int
    devices: int
    kind: str
    plan_ms: float
    queueing_ms: float
    fleets_judged: int
    machines_used: int
    usd_per_hour: float
    meets: bool


def counted(ask: Callable[..., Latency], judged: Judged) -> Callable[..., Latency]:
    """The queueing model, with a clock."""

    def asked(*args: object, **options: object) -> Latency:
        start_s = time.process_time()
        answer = ask(*args, **options)
        judged.seconds += time.process_time() - start_s
        judged.calls += 1
        return answer

    return asked


def measured(kind: str, instances: int, plan: Callable[[], SearchResult], judged: Judged, rounds: int) -> Row:
    """The median of so many plans."""
    times_s, queueing_s = [], []
    for _ in range(rounds):
        pace.cache_clear()
        judged.calls, judged.seconds = 0, 0.0
        start_s = time.process_time()
        found = plan()
        times_s.append(time.process_time() - start_s)
        queueing_s.append(judged.seconds)
    best = found.candidates[0]
    return Row(
        instances=instances,
        devices=best.num_idle + sum(choice.parallel.num_slots for choice in best.choices),
        kind=kind,
        plan_ms=statistics.median(times_s) * 1e3,
        queueing_ms=statistics.median(queueing_s) * 1e3,
        fleets_judged=judged.calls,
        machines_used=best.num_instances,
        usd_per_hour=best.usd_per_hour,
        meets=best.meets,
    )


def full_plans(args: argparse.Namespace, judged: Judged) -> list[Row]:
    """The curve."""
    model, machine = named_model(args.model), instance_type(args.instance)
    usd_per_hour = price_usd_per_hour(args.instance, spot=True)
    kinds = {"limits": Objective(ttft_s=args.ttft, tpot_s=args.tpot), "none": Objective()}
    rows = []
    for instances in args.sizes:
        zones = min(args.zones, instances)
        pools = [
            Pool(machine, len(range(zone, instances, zones)) * machine.num_devices, usd_per_hour * (1 + zone / 100), f"zone-{zone}")
            for zone in range(zones)
        ]
        workload = Workload(args.rate * instances, PROMPT, OUTPUT)
        for kind, objective in kinds.items():

            def plan(pools: list[Pool] = pools, workload: Workload = workload, objective: Objective = objective) -> SearchResult:
                return search(model, pools, workload, objective, speed_of=partial(replica_cost, model))

            if not rows:
                plan()
            rows.append(measured(kind, instances, plan, judged, args.rounds))
    return rows


def shown(rows: list[Row]) -> Table:
    """For people."""
    table = Table(title="full plan")
    for name in ("instances", "devices", "limits", "plan ms", "of it queueing", "fleets judged", "machines used", "USD/h", "meets"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row.instances),
            str(row.devices),
            row.kind,
            f"{row.plan_ms:.0f}",
            f"{row.queueing_ms:.0f}",
            str(row.fleets_judged),
            str(row.machines_used),
            f"{row.usd_per_hour:.2f}",
            "yes" if row.meets else "no",
        )
    return table


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-2-70b")
    parser.add_argument("--instance", default="g5.12xlarge")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="instances")
    parser.add_argument("--zones", type=int, default=3)
    parser.add_argument("--rate", type=float, default=0.1, help="requests per second and instance")
    parser.add_argument("--ttft", type=float, default=6.0, help="limit at the 99th percentile, seconds")
    parser.add_argument("--tpot", type=float, default=0.2, help="the same between two tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    args = parser.parse_args()
    judged = Judged()
    judge.latency = counted(judge.latency, judged)
    rows = full_plans(args, judged)
    if args.json:
        print(json.dumps({"model": args.model, "instance": args.instance, "full_plan": [asdict(row) for row in rows]}, indent=2))
    else:
        Console().print(shown(rows))


if __name__ == "__main__":
    main()
