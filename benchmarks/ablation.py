"""What each part of the controller is worth: it is taken away, and the same traces are played again.

    SPOTSERVE_DATA=~/data python benchmarks/ablation.py [--seeds 5] [--models 20B] [--traces A_S,B_S,g4dn] [--json]

The form of figure 9 of SpotServe's paper, but one part at a time instead of one after the other, and with intervals: each figure is
the P99 (mean, dollars) without the part over that with it, run by run over seeds of arrivals with a true coefficient of variation
of 1. Half of the losses come without notice, so that there is something to recover from.

    controller   one shape for ever, that which the planner chooses first, on all machines that are rented
    matching     new replicas on devices in order, whatever these hold
    schedule     weights in the order of their layers, whatever ports and deadlines allow
    arranger     on a notice everything is let go at once and computed again elsewhere
    hedge        no spares
    look-ahead   plans weighed by what they serve now, as if changing cost nothing and nothing were ever lost
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

from published_runs import MODELS, fleet_of, gamma_requests, scenario_of
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from spotserve.controller.methods import PRODUCTION, Methods
from spotserve.core.messages import SequenceAction, SequenceOrder, SequenceReport
from spotserve.core.model import ModelSpec
from spotserve.core.plan import Placement
from spotserve.migration.flows import Flow, InstanceLinks
from spotserve.migration.schedule import Schedule
from spotserve.migration.scores import Scores
from spotserve.migration.timing import Timed
from spotserve.migration.verdicts import Destination, InstanceSpeed
from spotserve.replay.intervals import ratio
from spotserve.replay.measures import measure
from spotserve.replay.ours import play_production
from spotserve.replay.scenario import show_nothing
from spotserve.replay.summary import Objectives
from spotserve.replay.timeline import Scaling, merge

FIRST_SHAPES = {"6.7B": (1, 4), "20B": (3, 4), "30B": (2, 8)}
"""(P, M) that the planner chooses first."""
WHOLE = "nothing"


def place_in_order(scores: Scores) -> Placement:
    """Slots on devices as they come."""
    return Placement(devices=dict(zip(scores.slots, scores.devices, strict=False)))


def send_in_order(
    flows: Sequence[Flow], *, links: Mapping[str, InstanceLinks], now_s: float, deadlines_s: Mapping[str, float]
) -> Schedule:
    """Flows as they come, one after the other."""
    del deadlines_s
    timed, at_s = [], now_s
    for flow in flows:
        end_s = at_s + flow.seconds(links)
        timed.append(Timed(flow, at_s, end_s))
        at_s = end_s
    return Schedule(tuple(timed), (), (), (), (), makespan_s=at_s - now_s, lower_bound_s=at_s - now_s)


def let_all_go(
    sequences: Sequence[SequenceReport],
    *,
    now_s: float,
    deadline_s: float,
    source: InstanceSpeed,
    destinations: Sequence[Destination],
    model: ModelSpec,
) -> tuple[SequenceOrder, ...]:
    """Everything is computed again elsewhere, at once."""
    del now_s, deadline_s, source, destinations, model
    return tuple(
        SequenceOrder(
            request_id=each.request_id, action=SequenceAction.RESUME, destination_replica_id=None, destination=None, reason="let go"
        )
        for each in sequences
    )


@dataclass(frozen=True, slots=True)
class Run:
    """One run."""

    trace: str
    model: str
    without: str
    seed: int
    rents: bool = True


WITHOUT: Mapping[str, Methods] = {
    "controller": PRODUCTION,
    "matching": Methods(place=place_in_order),
    "schedule": Methods(schedule=send_in_order),
    "arranger": Methods(decide=let_all_go),
    "hedge": PRODUCTION,
    "look-ahead": Methods(looks_ahead=False),
    WHOLE: PRODUCTION,
}


def _settings(run: Run) -> dict[str, Any]:
    if run.without == "controller":
        pipeline, tensor = FIRST_SHAPES[run.model]
        shape = {"planning": "shape", "pipeline": pipeline, "tensor": tensor}
        return {**shape, "instances": 8} if run.rents else shape
    return {"max_spares": 0} if run.without == "hedge" else {}


def play(run: Run) -> dict[str, float]:
    """What came of it."""
    model, fleet = MODELS[run.model], fleet_of(run.trace)
    length_s = fleet.end_s if fleet.end_s is not None else fleet.events[-1].time_s
    scenario = scenario_of(run.model, fleet, gamma_requests(model, length_s, 1.0, run.seed), gap_cv=1.0, seed=run.seed)
    scaling = Scaling(grace_s=30.0, seed=run.seed, duration_s=length_s, notice_share=0.5)
    timeline = merge(fleet, gamma_requests(model, length_s, 1.0, run.seed), scaling)
    scenario = replace(scenario, timeline=timeline, rents=run.rents)
    played = play_production(scenario, show_nothing, policy="spotserve", settings=_settings(run), methods=WITHOUT[run.without])
    measures = measure(played, Objectives())
    names = ("e2e_p99_s", "e2e_mean_s", "usd_per_million_tokens", "tokens_recomputed", "requests_lost")
    return {name: float(measures[name] or 0.0) for name in names}


def main() -> None:
    """Plays everything and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--models", default="20B")
    parser.add_argument("--traces", default="A_S,B_S,g4dn")
    parser.add_argument(
        "--all", action="store_true", help="hold all machines of the trace instead of renting those that are wanted"
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="for scripts")
    args = parser.parse_args()
    runs = [
        Run(trace, model, without, seed, rents=not args.all)
        for trace in args.traces.split(",")
        for model in args.models.split(",")
        for without in WITHOUT
        for seed in range(args.seeds)
        if without != "hedge" or not args.all
    ]
    found: dict[Run, dict[str, float]] = {}
    with ProcessPoolExecutor(args.jobs) as pool, Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("runs", total=len(runs))
        for run, figures in zip(runs, pool.map(play, runs), strict=True):
            found[run] = figures
            bar.advance(task)
    if args.json:
        print(json.dumps([asdict(run) | figures for run, figures in found.items()]))
        return
    Console(width=150).print(_table(found))


def _table(found: Mapping[Run, Mapping[str, float]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), title="Without a part, over with it", title_justify="left")
    for head in ("trace", "model", "without", "P99", "mean", "USD per token", "recomputed tokens", "lost"):
        table.add_column(head, justify="left" if head in ("trace", "model", "without") else "right")
    for trace, model in dict.fromkeys((run.trace, run.model) for run in found):
        base = _runs(found, trace, model, WHOLE)
        for without in WITHOUT:
            runs = _runs(found, trace, model, without)
            if not runs:
                continue
            ratios = (_told(runs, base, name) for name in ("e2e_p99_s", "e2e_mean_s", "usd_per_million_tokens"))
            recomputed, lost = (sum(each[name] for each in runs) for name in ("tokens_recomputed", "requests_lost"))
            table.add_row(trace, model, without, *ratios, f"{recomputed:,.0f}", f"{lost:.0f}")
    return table


def _runs(found: Mapping[Run, Mapping[str, float]], trace: str, model: str, without: str) -> list[Mapping[str, float]]:
    return [each for run, each in found.items() if (run.trace, run.model, run.without) == (trace, model, without)]


def _told(runs: Sequence[Mapping[str, float]], base: Sequence[Mapping[str, float]], name: str) -> str:
    ends = ratio([each[name] for each in runs], [each[name] for each in base])
    return "-" if ends is None else f"{ends[0]:.2f} [{ends[1]:.2f}, {ends[2]:.2f}]"


if __name__ == "__main__":
    main()
