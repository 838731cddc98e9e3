"""How long weighing plans takes as fleets grow, and how far its expectations are from victims drawn at random.

    python benchmarks/outlook.py [--json]

Time: eight options on one fleet of four zones, replicas of one, two or eight instances; *kept*: the options share most replicas
with what runs, *new*: all of their replicas are others. Median processor
time of seven calls after one that fills the tables of shuffles.

Error: expected service of one plan against the mean over 20,000 random draws of who is lost in 60 s and in 10 min, in standard
errors of those draws and as a share of the demand. The hazard is that of the public traces (0.32 loss instants per instance-hour,
their group sizes).
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence

import numpy as np

from spotserve.planner.cell_book import HazardPrior
from spotserve.planner.outlook import Footprint, Option, weigh
from spotserve.planner.risk import Cell, Risk
from spotserve.planner.victims import Exposure, Victims

NUM_ZONES = 4
NUM_OPTIONS = 8
DRAWS = 20_000


def cells_of(num_instances: int) -> tuple[Cell, ...]:
    """The instances i0, i1, .. in turn in each zone."""
    prior = HazardPrior()
    zones = [tuple(f"i{at}" for at in range(first, num_instances, NUM_ZONES)) for first in range(NUM_ZONES)]
    return tuple(Cell(f"zone {at}", ids, prior.instants_per_hour * len(ids), prior.sizes) for at, ids in enumerate(zones))


def options_of(num_instances: int, size: int, *, are_new: bool) -> list[Option]:
    """What runs and seven others; each leaves one replica out, and new ones are cut elsewhere."""
    options = []
    for number in range(NUM_OPTIONS):
        shift = number * (size // 2 + 1) if are_new else 0
        starts = range(shift + number * size, num_instances - size + 1, size)
        ids = [tuple(f"i{at}" for at in range(start, start + size)) for start in starts]
        rate = 1.0 + (number / 100 if are_new else 0.0)
        footprints = tuple(Footprint(each, rate + 0.1 * (at % 3)) for at, each in enumerate(ids))
        options.append(Option(f"option {number}", footprints, 1.0 * num_instances, 20.0 if number else 0.0, 0.0, 0))
    return options


def time_ms(num_instances: int, size: int, *, are_new: bool) -> float:
    """Median processor time of one call."""
    options = options_of(num_instances, size, are_new=are_new)
    risk = Risk(cells_of(num_instances))
    times = []
    for _ in range(8):
        start = time.process_time()
        weigh(options, stay="option 0", demand_rps=num_instances / size, risk=risk, recover_s=60.0, request_usd=0.01)
        times.append(time.process_time() - start)
    return statistics.median(times[1:]) * 1e3


def error(num_instances: int, size: int, seconds: float) -> tuple[float, float]:
    """(standard errors, share of the demand) between the expectation and its estimate from random draws."""
    cells = cells_of(num_instances)
    replicas = [(each.instance_ids, each.rate_rps) for each in options_of(num_instances, size, are_new=False)[0].replicas]
    demand = 0.95 * sum(rate for _, rate in replicas)
    told = Exposure(replicas, Victims(cells, seconds)).served(demand)
    drawn = _drawn(cells, replicas, seconds, demand)
    off = told - drawn.mean()
    return abs(off) / (drawn.std() / len(drawn) ** 0.5), off / demand


def _drawn(cells: Sequence[Cell], replicas: Sequence[tuple[tuple[str, ...], float]], seconds: float, demand: float) -> np.ndarray:  # type: ignore[type-arg]
    random = np.random.default_rng(1)
    of_instance: dict[str, list[int]] = {}
    for at, (ids, _) in enumerate(replicas):
        for each in ids:
            of_instance.setdefault(each, []).append(at)
    capacity = sum(rate for _, rate in replicas)
    served = np.empty(DRAWS)
    for draw in range(DRAWS):
        broken: set[int] = set()
        for cell in cells:
            instants = random.poisson(cell.instants_per_hour * seconds / 3600)
            sizes, shares = zip(*cell.sizes, strict=True)
            count = min(len(cell.instance_ids), int(random.choice(sizes, instants, p=shares).sum())) if instants else 0
            for at in random.choice(len(cell.instance_ids), count, replace=False) if count else ():
                broken.update(of_instance.get(cell.instance_ids[at], ()))
        served[draw] = min(demand, capacity - sum(replicas[at][1] for at in broken))
    return served


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the tables")
    arguments = parser.parse_args()
    times = [
        {
            "instances": count,
            "replica": size,
            "kept_ms": time_ms(count, size, are_new=False),
            "new_ms": time_ms(count, size, are_new=True),
        }
        for count in (64, 256, 1000, 4000, 10_000)
        for size in (1, 2, 8)
    ]
    errors = []
    for count in (16, 64, 256):
        for size in (1, 8):
            for seconds in (60.0, 600.0):
                sigmas, share = error(count, size, seconds)
                errors.append({"instances": count, "replica": size, "seconds": seconds, "standard_errors": sigmas, "share": share})
    if arguments.json:
        print(json.dumps({"times": times, "errors": errors}, indent=1))
        return
    print(f"{'instances':>9}{'replica':>9}{'kept':>12}{'new':>12}")
    for row in times:
        print(f"{row['instances']:>9}{row['replica']:>9}{row['kept_ms']:>9.1f} ms{row['new_ms']:>9.1f} ms")
    print(f"\n{'instances':>9}{'replica':>9}{'lost within':>13}{'standard errors':>17}{'of the demand':>15}")
    for row in errors:
        shown = (
            f"{row['instances']:>9}{row['replica']:>9}{row['seconds']:>11.0f} s{row['standard_errors']:>17.1f}{row['share']:>15.3%}"
        )
        print(shown)


if __name__ == "__main__":
    main()
