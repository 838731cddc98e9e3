"""SpotServe's paper, reproduced: its policy and its baselines on its own traces, beside what it published.

    SPOTSERVE_DATA=~/data python benchmarks/paper.py [--json]

Latencies of GPT-20B are those that the artifact's plot scripts hold, factors for the other models those printed in figure 6, cost
per token that of figure 7 (prompt and output tokens, requests that are answered within the trace). P99 is the value at place
int(0.99 n), as in the artifact; requests that are unfinished when a trace ends do not count, as there.
"""

import argparse
import json
from dataclasses import replace
from statistics import fmean
from typing import Any

from published_runs import MODELS, OUTPUT, PROMPT, fleet_of, published_percentile, published_requests, scenario_of, steady
from rich.console import Console
from rich.table import Table

from spotserve.replay.outcome import Replayed
from spotserve.replay.policies import POLICIES
from spotserve.replay.scenario import Scenario, show_nothing

PAPER_20B = {
    "spotserve-2024": {"A_S": (23.518, 46.108), "B_S": (23.315, 37.083), "A_S+O": (23.416, 49.005), "B_S+O": (20.724, 33.388)},
    "rerouting": {"A_S": (26.333, 51.008), "B_S": (47.57, 99.115), "A_S+O": (30.373, 50.732), "B_S+O": (24.58, 43.239)},
    "reparallelization": {"A_S": (32.045, 61.287), "B_S": (27.068, 56.284), "A_S+O": (32.663, 65.816), "B_S+O": (31.915, 73.257)},
}
"""Average and P99, seconds."""
PAPER_ON_DEMAND = {3: (141.482, 253.343), 4: (98.037, 175.346), 6: (29.146, 43.47), 8: (24.623, 34.45)}
PAPER_COST = {"A_S": 2.18, "B_S": 1.91, "A_S+O": 2.73, "B_S+O": 2.88}
"""1e-5 USD per token."""
PAPER_COST_ON_DEMAND = {3: 1.54, 4: 2.06, 6: 3.09, 8: 4.12}
PAPER_MINUTES = {"A_S": (203, 0), "B_S": (137, 0), "A_S+O": (210, 27), "B_S+O": (92, 26)}
"""Instance-minutes, spot and on demand, that the paper's cost counts."""
PAPER_FACTORS = {
    "6.7B": {"A_S": (2.48, 3.01), "B_S": (2.52, 5.84), "A_S+O": (2.23, 1.97), "B_S+O": (3.76, 1.03)},
    "20B": {"A_S": (1.33, 1.11), "B_S": (1.52, 2.67), "A_S+O": (1.34, 1.04), "B_S+O": (2.19, 1.30)},
    "30B": {"A_S": (1.40, 3.97), "B_S": (1.61, 9.13), "A_S+O": (1.34, 2.14), "B_S+O": (2.43, 2.27)},
}
"""P99 of Reparallelization and of Rerouting over that of SpotServe (figure 6)."""
ON_DEMAND_S = 18 * 60.0


def main() -> None:
    """Prints everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="for scripts")
    as_json = parser.parse_args().json
    found = {"latency": _latencies(), "on_demand": _on_demand(), "cost": _costs(), "factors": _factors()}
    if as_json:
        print(json.dumps(found, indent=1))
        return
    console = Console(width=150)
    for name, rows in found.items():
        table = Table(title=name.replace("_", " "), title_justify="left", box=None, padding=(0, 2, 0, 0))
        for column in rows[0]:
            table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
        for row in rows:
            table.add_row(*(each if isinstance(each, str) else f"{each:.4g}" for each in row.values()))
        console.print(table)
        console.print()


def _play(policy: str, scenario: Scenario) -> tuple[Replayed, list[float]]:
    """What came of it, and the latencies of requests that were answered within the trace."""
    replayed = POLICIES[policy].play(scenario, show_nothing)
    return replayed, [each.e2e_s for each in replayed.outcomes if each.e2e_s is not None and each.end_s <= replayed.duration_s]


def _scenario(model: str, trace: str) -> Scenario:
    return scenario_of(model, fleet_of(trace), published_requests(MODELS[model]), gap_cv=0.1)


def _latencies() -> list[dict[str, Any]]:
    rows = []
    for policy, traces in PAPER_20B.items():
        for trace, (mean_s, p99_s) in traces.items():
            replayed, e2e_s = _play(policy, _scenario("20B", trace))
            ours, tail = fmean(e2e_s), published_percentile(e2e_s, 0.99)
            lost = sum(not each.is_whole for each in replayed.outcomes)
            rows.append(
                {"policy": policy, "trace": trace, "requests": len(e2e_s), "mean_s": ours, "paper": mean_s, "ratio": ours / mean_s}
                | {"p99_s": tail, "paper p99": p99_s, "p99 ratio": tail / p99_s, "lost": lost}
            )
    return rows


def _on_demand() -> list[dict[str, Any]]:
    rows = []
    for machines, (mean_s, p99_s) in PAPER_ON_DEMAND.items():
        scenario = scenario_of("20B", steady(machines, ON_DEMAND_S), published_requests(MODELS["20B"]), gap_cv=0.1)
        _, e2e_s = _play("spotserve-2024", scenario)
        ours, tail = fmean(e2e_s), published_percentile(e2e_s, 0.99)
        rows.append(
            {"machines": machines, "requests": len(e2e_s), "mean_s": ours, "paper": mean_s, "ratio": ours / mean_s}
            | {"p99_s": tail, "paper p99": p99_s, "p99 ratio": tail / p99_s}
        )
    return rows


def _costs() -> list[dict[str, Any]]:
    """With the paper's instance-minutes (the answers are ours), and with those of the trace, all at the spot price."""
    rows = []
    for trace, paper in PAPER_COST.items():
        scenario = _scenario("20B", trace)
        replayed, _ = _play("spotserve-2024", scenario)
        tokens = len(replayed.outcomes) * (PROMPT + OUTPUT)
        spot, on_demand = PAPER_MINUTES[trace]
        counted = (spot * scenario.prices.spot_usd_per_hour + on_demand * scenario.prices.on_demand_usd_per_hour) / 60
        leased = sum(lease.usd for lease in replayed.leases)
        rows.append(
            {"fleet": trace, "1e-5 USD/token": counted / tokens * 1e5, "paper": paper, "ratio": counted / tokens * 1e5 / paper}
            | {"by the trace": leased / tokens * 1e5, "spot minutes": sum(lease.hours for lease in replayed.leases) * 60}
        )
    for machines, paper in PAPER_COST_ON_DEMAND.items():
        scenario = scenario_of("20B", steady(machines, ON_DEMAND_S), published_requests(MODELS["20B"]), gap_cv=0.1)
        usd = machines * ON_DEMAND_S / 3600 * scenario.prices.on_demand_usd_per_hour
        cost = usd / (len(scenario.timeline.arrivals) * (PROMPT + OUTPUT)) * 1e5
        rows.append(
            {"fleet": f"{machines} on demand", "1e-5 USD/token": cost, "paper": paper, "ratio": cost / paper}
            | {"by the trace": cost, "spot minutes": 0.0}
        )
    return rows


def _factors() -> list[dict[str, Any]]:
    """P99 of the baselines over that of SpotServe, and over that of this project's controller, of all requests."""
    rows = []
    for model, traces in PAPER_FACTORS.items():
        for trace, (reparallelization, rerouting) in traces.items():
            p99_s = {}
            for policy in ("spotserve-2024", "reparallelization", "rerouting", "spotserve"):
                replayed, _ = _play(policy, replace(_scenario(model, trace), rents=policy == "spotserve"))
                p99_s[policy] = published_percentile([each.e2e_s for each in replayed.outcomes if each.e2e_s is not None], 0.99)
            rows.append(
                {"model": model, "trace": trace}
                | {"reparallelization": p99_s["reparallelization"] / p99_s["spotserve-2024"], "paper": reparallelization}
                | {"rerouting": p99_s["rerouting"] / p99_s["spotserve-2024"], "paper ": rerouting}
                | {"reparallelization over ours": p99_s["reparallelization"] / p99_s["spotserve"]}
                | {"rerouting over ours": p99_s["rerouting"] / p99_s["spotserve"]}
            )
    return rows


if __name__ == "__main__":
    main()
