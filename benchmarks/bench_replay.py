"""SpotServe's paper, beaten: this project's controller beside the published one, on the same hardware model, traces and requests.

    SPOTSERVE_DATA=~/data python benchmarks/bench_replay.py [--seeds 5] [--models 20B] [--traces A_S,g4dn] [--json]

Four segments and the whole g4dn trace, three models, arrivals as in the paper (nearly constant) and with a true coefficient of
variation of 1 and 6, five seeds each. Both get the same measured times of the same machines, the same 30 s of notice, 120 s of
starting, 50 Gb/s; both are told the mean rate. `ours` rents of the trace's machines those that it wants; `ours, all` pays for all
of them, as the published policy does. What differs is what each decides and how it batches: continuously, up to the profiled batch
of 8, against batches of up to 4 that run to their end. A prompt takes both as long as it was measured to take: the published
formula, by which `benchmarks/paper.py` reproduces the paper, has batches compute their prompts in a quarter of it.

Figures are means over seeds; of the ratios the interval of 95 % over paired seeds is told. Near-constant arrivals are the paper's
one file, so they have one seed (the whole trace: evenly spaced, since the paper's files end before it does).
"""

import argparse
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from statistics import fmean

from published_runs import (
    MODELS,
    SEGMENTS,
    WHOLE,
    even_requests,
    fleet_of,
    gamma_requests,
    published_requests,
    scenario_of,
)
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from spotserve.replay.intervals import ratio
from spotserve.replay.measures import measure
from spotserve.replay.policies import POLICIES
from spotserve.replay.scenario import Scenario, show_nothing
from spotserve.replay.summary import Objectives

ARRIVALS = {"as published": 0.1, "CV 1": 1.0, "CV 6": 6.0}
PLAYERS = {"ours": ("spotserve", True), "ours, all": ("spotserve", False), "spotserve-2024": ("spotserve-2024", False)}
"""Policy, and whether it rents."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One run."""

    trace: str
    model: str
    arrivals: str
    seed: int
    player: str


@dataclass(frozen=True, slots=True)
class Figures:
    """What came of it."""

    p99_s: float
    mean_s: float
    usd_per_million_tokens: float
    lost: int


def main() -> None:
    """Plays everything and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--traces", default=",".join([*SEGMENTS, WHOLE]))
    parser.add_argument("--arrivals", default=",".join(ARRIVALS))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="for scripts")
    args = parser.parse_args()
    cells = list(_cells(args.traces.split(","), args.models.split(","), args.arrivals.split(","), args.seeds))
    console = Console(width=150)
    found: dict[Cell, Figures] = {}
    with ProcessPoolExecutor(args.jobs) as pool, Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("runs", total=len(cells))
        for cell, figures in zip(cells, pool.map(_play, cells), strict=True):
            found[cell] = figures
            bar.advance(task)
    if args.json:
        print(json.dumps([asdict(cell) | asdict(figures) for cell, figures in found.items()]))
        return
    console.print(_table(found))


def _cells(traces: list[str], models: list[str], arrivals: list[str], seeds: int) -> Iterator[Cell]:
    for trace in traces:
        for model in models:
            for name in arrivals:
                for seed in range(1 if name == "as published" else seeds):
                    for player in PLAYERS:
                        yield Cell(trace, model, name, seed, player)


def _scenario(cell: Cell) -> Scenario:
    model, fleet, gap_cv = MODELS[cell.model], fleet_of(cell.trace), ARRIVALS[cell.arrivals]
    length_s = fleet.end_s if fleet.end_s is not None else fleet.events[-1].time_s
    if cell.arrivals != "as published":
        load = gamma_requests(model, length_s, gap_cv, cell.seed)
    elif cell.trace == WHOLE:
        load = even_requests(model, length_s)
    else:
        load = published_requests(model)
    return scenario_of(cell.model, fleet, load, gap_cv=gap_cv, seed=cell.seed, run_as_published=False)


def _play(cell: Cell) -> Figures:
    policy, rents = PLAYERS[cell.player]
    replayed = POLICIES[policy].play(replace(_scenario(cell), rents=rents), show_nothing)
    measures = measure(replayed, Objectives())
    return Figures(
        p99_s=float(measures["e2e_p99_s"] or 0.0),
        mean_s=float(measures["e2e_mean_s"] or 0.0),
        usd_per_million_tokens=float(measures["usd_per_million_tokens"] or 0.0),
        lost=int(measures["requests_lost"] or 0),
    )


def _table(found: dict[Cell, Figures]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), title="P99 and USD per million tokens", title_justify="left")
    heads = ("trace", "model", "arrivals", "P99 2024", "P99 ours", "2024 / ours", "P99 ours, all", "2024 / ours, all")
    for head in (*heads, "USD 2024", "USD ours", "ours / 2024", "lost 2024", "lost ours"):
        table.add_column(head, justify="left" if head in ("trace", "model", "arrivals") else "right")
    for trace, model, arrivals in dict.fromkeys((cell.trace, cell.model, cell.arrivals) for cell in found):
        runs = {
            player: [
                figures
                for cell, figures in found.items()
                if (cell.trace, cell.model, cell.arrivals, cell.player) == (trace, model, arrivals, player)
            ]
            for player in PLAYERS
        }
        ours, whole, theirs = (runs[player] for player in ("ours", "ours, all", "spotserve-2024"))
        table.add_row(
            *(trace, model, arrivals),
            f"{fmean(each.p99_s for each in theirs):.1f}",
            f"{fmean(each.p99_s for each in ours):.1f}",
            _ratio([each.p99_s for each in theirs], [each.p99_s for each in ours]),
            f"{fmean(each.p99_s for each in whole):.1f}",
            _ratio([each.p99_s for each in theirs], [each.p99_s for each in whole]),
            f"{fmean(each.usd_per_million_tokens for each in theirs):.1f}",
            f"{fmean(each.usd_per_million_tokens for each in ours):.1f}",
            _ratio([each.usd_per_million_tokens for each in ours], [each.usd_per_million_tokens for each in theirs]),
            str(sum(each.lost for each in theirs)),
            str(sum(each.lost for each in ours) + sum(each.lost for each in whole)),
        )
    return table


def _ratio(ours: list[float], theirs: list[float]) -> str:
    found = ratio(ours, theirs)
    if found is None:
        return "-"
    mean, low, high = found
    return f"{mean:.2f}" if low == high else f"{mean:.2f} [{low:.2f}, {high:.2f}]"


if __name__ == "__main__":
    main()
