"""How near to the bound migrations end, what scheduling costs, and what the changes of the SpotServe paper come to.

    python benchmarks/migration_schedule.py
    python benchmarks/migration_schedule.py --migrations 200 --json

1. Random migrations: a random model cut anew over 2 to 16 instances of which some are lost and some are new, with real
   placements, transfers and KV of running sequences. How much longer the schedule takes than the load of its busiest port (which no
   schedule can beat): in the order of importance that is used, and in none (plain: longest first). When stages are whole, of the
   makespan: mean over stages. What preferring the smallest busiest port among nearly equal placements gives.
2. Cost: time per schedule as flows grow, all in one group and in groups of four instances.
3. The changes of the paper (GPT-20B, LLaMA-30B, OPT-6.7B in float32, 4 devices per instance, 50 Gbit/s) beside the estimate of its
   artifact and the load of the busiest port of *its* placement, full duplex. The artifact sends padding layers too; ours
   is given with them, to compare like with like, and without. KV of four sequences of 640 tokens per old replica is included,
   keys and values; the artifact counts keys alone. It keeps the embedding on every device, so it never sends it: here each shard of
   a first stage takes it whole (1.3 GB each for GPT-20B).

Pure computing on one core; nothing is sent.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from statistics import mean, median
from typing import Any

from migrations import Migration, Shape, decoder, migration, random_migration
from rich.console import Console
from rich.table import Table

from spotserve.core.cluster import DeviceId
from spotserve.core.hardware import Link
from spotserve.migration.flows import WEIGHTS, Flow, InstanceLinks
from spotserve.migration.schedule import Schedule, schedule


@dataclass(frozen=True)
class Paper:
    """One change, and what is known of it ([C] in our notes: computed by the artifact's own planner)."""

    name: str
    model: str
    old: Shape
    new: Shape
    instances: tuple[int, int]
    lost: int
    estimate_s: float
    moved_gb: float
    bound_s: float | None


MODELS = {"20B": (6144, 48, 44, 48), "30B": (7168, 56, 48, 48), "6.7B": (4096, 32, 32, 36)}
"""Hidden size, heads, layers, layers with padding."""

PAPER = (
    Paper("20B (2,2,8) -> (2,3,4)", "20B", (2, 2, 8), (2, 3, 4), (8, 7), 1, 8.9, 130, 3.7),
    Paper("20B (2,2,8), one swapped", "20B", (2, 2, 8), (2, 2, 8), (8, 8), 1, 6.1, 38, 5.3),
    Paper("20B (2,3,4) -> (2,2,8)", "20B", (2, 3, 4), (2, 2, 8), (6, 8), 0, 9.7, 150, 4.5),
    Paper("20B (2,2,8) -> (3,3,4)", "20B", (2, 2, 8), (3, 3, 4), (8, 9), 0, 9.5, 193, 5.5),
    Paper("30B (1,4,8) -> (1,3,8)", "30B", (1, 4, 8), (1, 3, 8), (8, 7), 1, 5.8, 67, 3.4),
    Paper("6.7B (5,2,4) -> (9,1,4)", "6.7B", (5, 2, 4), (9, 1, 4), (10, 9), 1, 5.7, 162, None),
)
VOCABULARY = 51_200
CONTEXTS = (640,) * 4
LINKS = InstanceLinks(Link(0.0, 50e9 / 8), Link(0.0, 50e9 / 8))
"""The artifact takes 50 Gbit/s inside an instance as well."""


def timed(flows: Sequence[Flow], made: Migration) -> Schedule:
    """The schedule of a migration without deadline or memory bound."""
    return schedule(flows, links=made.links, now_s=0.0)


def excess(result: Schedule) -> float:
    """By what share a schedule is longer than its busiest port's load."""
    return result.makespan_s / result.lower_bound_s - 1


def stages_ready(result: Schedule) -> float:
    """Mean over stages that wait for weights: when the last arrived, as a share of the makespan."""
    ready: dict[str, float] = {}
    for each in result.timed:
        if each.flow.rank[0] == WEIGHTS:
            stage = each.flow.what.rpartition("/")[0].rpartition(" ")[2]
            ready[stage] = max(ready.get(stage, 0.0), each.end_s)
    return mean(ready.values()) / result.makespan_s if ready else 1.0


def random_migrations(count: int, seed: int) -> dict[str, Any]:
    """Part 1."""
    random = Random(seed)
    ranked, plain, ready, ready_plain, num_flows, seconds, sooner = [], [], [], [], [], [], []
    while len(ranked) < count:
        state = random.getstate()
        made = random_migration(random)
        if not made.flows:
            continue
        began_s = time.perf_counter()
        result = timed(made.flows, made)
        seconds.append(time.perf_counter() - began_s)
        assert len(result.timed) == len(made.flows)
        ranked.append(excess(result))
        plain.append(excess(timed([replace(flow, is_last_copy=False, rank=(0, 0)) for flow in made.flows], made)))
        num_flows.append(len(made.flows))
        if len(ranked) % 5:
            continue
        unranked = timed([replace(flow, is_last_copy=False, rank=(flow.rank[0], 0)) for flow in made.flows], made)
        ready.append(stages_ready(result))
        ready_plain.append(stages_ready(unranked))
        again = Random()
        again.setstate(state)
        heaviest = random_migration(again, nearly=0.0)
        sooner.append(result.makespan_s / timed(heaviest.flows, heaviest).makespan_s)
    return {
        "migrations": count,
        "flows_mean": mean(num_flows),
        "flows_max": max(num_flows),
        "schedule_ms_mean": 1e3 * mean(seconds),
        "schedule_ms_max": 1e3 * max(seconds),
        "excess": spread(ranked),
        "excess_plain": spread(plain),
        "placed_for_port": {
            "makespan_mean": mean(sooner),
            "share_shorter": mean(each < 1 - 1e-9 for each in sooner),
            "share_longer": mean(each > 1 + 1e-9 for each in sooner),
        },
        "stages_ready_share": mean(ready),
        "stages_ready_share_without_stage_order": mean(ready_plain),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, median, 95th percentile and maximum."""
    ordered = sorted(values)
    return {"mean": mean(ordered), "median": median(ordered), "p95": ordered[int(0.95 * (len(ordered) - 1))], "max": ordered[-1]}


def one_group(random: Random, count: int) -> list[Flow]:
    """Flows between any two of so many instances that each has about 20."""
    return _flows(random, count, lambda: random.sample(range(max(4, count // 20)), 2))


def small_groups(random: Random, count: int) -> list[Flow]:
    """The same, but four instances each keep to themselves."""

    def pair() -> list[int]:
        first = 4 * random.randrange(max(1, count // 80))
        return [first + each for each in random.sample(range(4), 2)]

    return _flows(random, count, pair)


def _flows(random: Random, count: int, pair: Callable[[], list[int]]) -> list[Flow]:
    made = []
    for index in range(count):
        source, destination = (DeviceId(f"i-{each:04}", random.randrange(4)) for each in pair())
        made.append(Flow(f"w-{index}", source, destination, int(random.lognormvariate(19, 1)) + 1, rank=(1, random.randrange(4))))
    return made


def growth(sizes: Sequence[int], seed: int) -> list[dict[str, Any]]:
    """Part 2: medians of three."""
    rows = []
    for count in sizes:
        row: dict[str, Any] = {"flows": count}
        for name, make in (("one_group", one_group), ("small_groups", small_groups)):
            flows = make(Random(seed), count)
            links = {each: LINKS for flow in flows for each in (flow.source.instance_id, flow.destination.instance_id)}
            seconds = []
            for _ in range(3):
                began_s = time.perf_counter()
                result = schedule(flows, links=links, now_s=0.0)
                seconds.append(time.perf_counter() - began_s)
            row[f"{name}_ms"] = 1e3 * median(seconds)
            row[f"{name}_excess"] = excess(result)
        rows.append(row)
    return rows


def paper(change: Paper) -> dict[str, Any]:
    """Part 3."""
    hidden, heads, layers, padded = MODELS[change.model]
    before = [f"i-{index:02}" for index in range(change.instances[0])]
    stay = before[change.lost :]
    after = [*stay, *(f"j-{index:02}" for index in range(change.instances[1] - len(stay)))]
    row: dict[str, Any] = {
        "change": change.name,
        "published": {"estimate_s": change.estimate_s, "moved_gb": change.moved_gb, "bound_s": change.bound_s},
    }
    for name, count in (("padded", padded), ("ours", layers)):
        model = decoder(layers=count, hidden=hidden, heads=heads, kv_heads=heads, vocabulary=VOCABULARY, value_bytes=4)
        made = migration(
            change.name,
            model,
            change.old,
            change.new,
            before=before,
            after=after,
            devices=4,
            links=LINKS,
            contexts=[CONTEXTS] * change.old[0],
        )
        result = timed(made.flows, made)
        node: Counter[str] = Counter()
        for flow in made.flows:
            if not flow.is_inside:
                node[flow.source.instance_id] += flow.num_bytes
                node[flow.destination.instance_id] += flow.num_bytes
        row[name] = {
            "moved_gb": sum(flow.num_bytes for flow in made.flows) / 1e9,
            "network_gb": sum(flow.num_bytes for flow in made.flows if not flow.is_inside) / 1e9,
            "busiest_node_gb": max(node.values(), default=0) / 1e9,
            "makespan_s": result.makespan_s,
            "bound_s": result.lower_bound_s,
        }
    return row


def show(answer: dict[str, Any], console: Console) -> None:
    """Prints what was found."""
    found = answer["random"]
    console.print(
        f"{found['migrations']} random migrations, {found['flows_mean']:.0f} flows on average, {found['flows_max']} at most; "
        f"scheduled in {found['schedule_ms_mean']:.0f} ms on average, {found['schedule_ms_max']:.0f} at most"
    )
    table = Table("makespan over lower bound", "mean", "median", "p95", "max")
    for name, key in (("in the order of importance", "excess"), ("plain, longest first", "excess_plain")):
        table.add_row(name, *(f"{100 * found[key][each]:.2f} %" for each in ("mean", "median", "p95", "max")))
    console.print(table)
    console.print(
        f"a stage is whole after {100 * found['stages_ready_share']:.1f} % of the makespan on average, "
        f"{100 * found['stages_ready_share_without_stage_order']:.1f} % without the order of stages"
    )
    port = found["placed_for_port"]
    console.print(
        f"placed for the busiest port, a migration takes {100 * port['makespan_mean']:.1f} % of the time that it takes placed for "
        "bytes alone: "
        f"shorter in {100 * port['share_shorter']:.0f} %, longer in {100 * port['share_longer']:.0f} % of cases"
    )
    table = Table("flows", "one group: ms", "over bound", "groups of four: ms", "over bound")
    for row in answer["growth"]:
        cells = [(row[f"{name}_ms"], row[f"{name}_excess"]) for name in ("one_group", "small_groups")]
        table.add_row(f"{row['flows']:,}", *(text for ms, over in cells for text in (f"{ms:.1f}", f"{100 * over:.2f} %")))
    console.print(table)
    table = Table(
        "change", "published: T est", "GB", "bound", "padded: GB", "network", "makespan", "ours: GB", "network", "makespan", "bound"
    )
    for row in answer["paper"]:
        known, padded, ours = row["published"], row["padded"], row["ours"]
        bound = "-" if known["bound_s"] is None else f"{known['bound_s']:.1f}"
        table.add_row(
            row["change"],
            f"{known['estimate_s']:.1f}",
            f"{known['moved_gb']:.0f}",
            bound,
            *(f"{padded[key]:.1f}" for key in ("moved_gb", "network_gb", "makespan_s")),
            *(f"{ours[key]:.1f}" for key in ("moved_gb", "network_gb", "makespan_s", "bound_s")),
        )
    console.print(table)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--migrations", type=int, default=1000, help="5 at least")
    parser.add_argument("--sizes", type=int, nargs="*", default=[100, 300, 1000, 3000, 10_000])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    answer = {
        "random": random_migrations(options.migrations, options.seed),
        "growth": growth(options.sizes, options.seed),
        "paper": [paper(change) for change in PAPER],
    }
    if options.json:
        print(json.dumps(answer, indent=1))
    else:
        show(answer, Console(width=160))


if __name__ == "__main__":
    main()
