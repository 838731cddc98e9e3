"""How far a simulated replay is off: the same traces, simulated and against a local cluster, measure by measure.

    python benchmarks/fidelity.py [--replicas N] [--json]       half an hour, on a machine with two cores that does nothing else

A cluster of two instances serves three made traces with machines that are taken, with notice and without, three times each in turn:
a shared machine is not equally fast all day, and two live runs of one trace differ (`live spread`, largest / smallest - 1). The
error is simulated / median of the live ones - 1. One replica serves and the other instance is there to take its place, so that a
replica has a core of its own, as on a machine of its own. With two, they share two cores with gateway, controller and clients; a
simulated machine shares nothing.

What a replay is told about machines is measured, as profiles of GPUs are: the speed of the engine alone, before; what the cluster
adds to it, on undisturbed runs before, between and after the others (`fitted_speed`); the time that machines need to start, on a
run in which they come and go by the clock. Nothing is fitted to what is judged.

The model is the one that ships with more layers, so that a step is long beside what client and gateway do. It does not speculate
and keeps no prefixes: how often either helps depends on the text, which a trace does not have.
"""

import argparse
import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import msgspec
from fidelity_traces import ALL_GONE_S, INSTANCES, SEEDS, itinerary
from fitted_speed import FittedSpeed, fit_speed, profile
from rich.console import Console
from rich.table import Table

from spotserve.bench.enlarged import enlarge
from spotserve.cli.local import own_cluster
from spotserve.cli.plan_inputs import read_model
from spotserve.config import DEMO_MODEL, EngineSettings, LocalCloudSettings
from spotserve.core.hardware import DeviceType, InstanceType, Link
from spotserve.core.model import ModelSpec
from spotserve.core.plan import Parallel
from spotserve.planner.speed import ReplicaSpeed
from spotserve.replay import live
from spotserve.replay.comparison import FIDELITY
from spotserve.replay.lived import lived
from spotserve.replay.measures import Measures, measure
from spotserve.replay.ours import play_production
from spotserve.replay.outcome import Replayed
from spotserve.replay.record import RunRecord
from spotserve.replay.run import ReplayOptions, connected, driven_by_trace
from spotserve.replay.scenario import Delays, Prices, Scenario, show_nothing
from spotserve.replay.summary import Objectives
from spotserve.replay.timeline import Action, Arrive, Timeline

RATES_RPS = {1: 1.0, 2: 1.5}
"""By the number of replicas."""
ENGINE_STEP_TOKENS = EngineSettings().max_step_tokens
OBJECTIVES = Objectives(ttft_s=0.5, tpot_s=0.05)


@dataclass(frozen=True)
class Starts:
    """How long machines of the cluster take until they serve, in seconds."""

    start_up_s: float
    """From its launch until a worker takes commands."""
    beside_s: float
    """From being wanted until it serves, with weights from a machine that is there."""
    alone_s: float
    """The same with weights from files."""


def starts_of(run: RunRecord) -> Starts:
    """Medians of the run of `comes_and_goes`."""
    seen: dict[str, dict[str, float]] = {}
    for event in run.fleet_events:
        if event.instance is not None:
            seen.setdefault(event.instance, {}).setdefault(event.kind, event.time_s - run.started_s)
    goings_s = [(instance, kinds[kind]) for instance, kinds in seen.items() for kind in ("notice", "lost") if kind in kinds]
    start_ups_s, besides_s, alones_s = [], [], []
    for instance, kinds in seen.items():
        if "registered" in kinds:
            start_ups_s.append(kinds["registered"] - kinds["launched"])
        if "ready" in kinds:
            began_s = max(
                kinds.get("registered", 0.0), *(at_s for who, at_s in goings_s if who != instance and at_s < kinds["ready"])
            )
            (alones_s if kinds.get("launched", 0.0) > ALL_GONE_S else besides_s).append(kinds["ready"] - began_s)
    return Starts(median(start_ups_s), median(besides_s), median(alones_s))


async def run_live(url: str, secret: str, timelines: Sequence[Timeline]) -> list[RunRecord]:
    """Each timeline against the cluster."""
    with TemporaryDirectory() as folder:
        options = ReplayOptions(url=url, secret=secret, out=Path(folder), requests=Path(folder))
        async with connected(options, Console(stderr=True)) as system, driven_by_trace(system, options.prices):
            return [
                await live.carry_out(timeline, system, label=f"live {number} of {len(timelines)}", patience_s=120.0)
                for number, timeline in enumerate(timelines, start=1)
            ]


@dataclass(frozen=True)
class World:
    """What the simulated cluster is made of."""

    model: ModelSpec
    starts: Starts
    replicas: int

    def play(self, timeline: Timeline, speed: FittedSpeed) -> Replayed:
        """The same timeline without machines."""

        def speed_of(parallel: Parallel, hardware: InstanceType) -> ReplicaSpeed | str:
            del hardware
            return speed if parallel.num_slots == 1 else "one device each"

        weight_bytes, starts = self.model.weight_bytes, self.starts
        scenario = Scenario(
            timeline=timeline,
            model=self.model,
            machine=msgspec.structs.replace(CORE, network=Link(0.0, weight_bytes / max(starts.beside_s - BUILD_S, 0.01))),
            prices=Prices(spot_usd_per_hour=1.0, on_demand_usd_per_hour=2.0),
            delays=Delays(
                start_up_s=starts.start_up_s,
                file_bytes_per_s=weight_bytes / max(starts.alone_s - BUILD_S, 0.01),
                bring_up_s=BUILD_S,
                loss_heard_s=0.05,
            ),
            speed_of=speed_of,
            max_batch=speed.max_batch,
            step_tokens=ENGINE_STEP_TOKENS,
        )
        settings = {"planning": "shape", "data": self.replicas, "pipeline": 1, "tensor": 1}
        return play_production(scenario, show_nothing, policy="spotserve", settings=settings)


def as_sent(timeline: Timeline, run: RunRecord) -> Timeline:
    """The lengths that the system saw: prompts by its own count, answers as long as they became."""
    seen = {record.arrival.index: record for record in run.requests if record.complete}

    def adjusted(action: Action) -> Action:
        record = seen.get(action.index) if isinstance(action, Arrive) else None
        if record is None or not isinstance(action, Arrive):
            return action
        return replace(action, prompt_tokens=record.prompt_tokens or 1, output_tokens=len(record.token_ids))

    return replace(timeline, actions=tuple(adjusted(action) for action in timeline.actions))


def measured(run: RunRecord, timeline: Timeline) -> Measures:
    """A live run as reports measure it."""
    return measure(lived(run, LocalCloudSettings(), duration_s=timeline.duration_s, seed=0), OBJECTIVES)


def serve_live(settings: EngineSettings, replicas: int, folder: Path) -> list[RunRecord]:
    """The itinerary against a cluster of its own."""
    config = folder / "settings.toml"
    config.write_text(
        f'[engine]\nmodel = "{settings.model}"\ndtype = "{settings.dtype}"\nspeculation = "off"\nprefix_cache = false\n'
        f'[controller]\nplanning = "shape"\ndata = {replicas}\n'
    )
    with own_cluster(0, INSTANCES, config) as (url, secret):
        return asyncio.run(run_live(url, secret, itinerary(RATES_RPS[replicas])))


@dataclass(frozen=True)
class Compared:
    """One measure of one trace."""

    trace: int
    measure: str
    simulated: float | None
    live: tuple[float | None, ...]
    """In the order in which they ran."""

    @property
    def known(self) -> list[float]:
        """Live ones that are known, smallest first."""
        return sorted(each for each in self.live if each is not None)

    @property
    def error(self) -> float | None:
        """Simulated / median of the live ones - 1."""
        middle = median(self.known) if self.known else 0.0
        return None if self.simulated is None or not middle else self.simulated / middle - 1

    @property
    def spread(self) -> float | None:
        """Largest / smallest live one - 1."""
        return self.known[-1] / self.known[0] - 1 if self.known and self.known[0] else None


def compare(
    model: ModelSpec, alone: FittedSpeed, replicas: int, runs: Sequence[RunRecord]
) -> tuple[World, FittedSpeed, list[Compared]]:
    """The judged runs of an itinerary against their simulations, and what these were told."""
    timelines = [as_sent(timeline, run) for timeline, run in zip(itinerary(RATES_RPS[replicas]), runs, strict=True)]
    world = World(model, starts_of(runs[0]), replicas)
    period = len(SEEDS) + 1
    speed = fit_speed(alone, [(timelines[place], runs[place]) for place in range(1, len(runs), period)], world.play)
    rows = []
    for number in range(len(SEEDS)):
        places = range(2 + number, len(runs), period)
        found = measure(world.play(timelines[places[0]], speed), OBJECTIVES)
        told = [measured(runs[place], timelines[place]) for place in places]
        rows += [Compared(number + 1, name, found[name], tuple(each[name] for each in told)) for name in FIDELITY]
    return world, speed, rows


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, choices=(1, 2), default=1, help="that serve; 2: on the same two cores as all else")
    parser.add_argument("--json", action="store_true", help="for scripts")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        settings = make_model(Path(folder))
        alone = profile(settings)
        runs = serve_live(settings, arguments.replicas, Path(folder))
        world, speed, rows = compare(read_model(folder, settings.dtype), alone, arguments.replicas, runs)
    if arguments.json:
        told = {
            "starts": asdict(world.starts),
            "alone": asdict(alone),
            "speed": asdict(speed),
            "rows": [asdict(row) for row in rows],
        }
        print(json.dumps(told))
        return
    console = Console(width=120)
    console.print(world.starts, "engine alone:", alone, "in the cluster:", speed)
    console.print(table_of(rows))


def make_model(folder: Path) -> EngineSettings:
    """The model that ships with more layers, and what it is served with."""
    enlarge(DEMO_MODEL, folder, hidden_size=256, layers=16, intermediate_size=768, heads=8, dtype="float32")
    return EngineSettings(model=str(folder), dtype="float32", speculation="off", prefix_cache=False)


def table_of(rows: Sequence[Compared]) -> Table:
    """A line for each of them."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for head in ("trace", "measure", "simulated", "live", "error", "live spread"):
        table.add_column(head, justify="left" if head == "measure" else "right")
    for row in rows:
        live_told = " ".join(_figure(each) for each in row.live)
        table.add_row(str(row.trace), row.measure, _figure(row.simulated), live_told, _percent(row.error), _percent(row.spread))
    return table


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:+.1f} %"


BUILD_S = 0.3
"""Of bringing up, what neither sending nor reading takes; only their sums are measured."""
CORE = InstanceType(
    name="local",
    device=DeviceType(name="cpu", memory_bytes=4 * 10**9, flops_per_s=1e11, memory_bytes_per_s=1e10, layer_overhead_s=0.0),
    num_devices=1,
    device_link=Link(0.0, 1e9),
    network=Link(0.0, 1e9),
    host_memory_bytes=4 * 10**9,
    host_link=Link(0.0, 1e9),
)

if __name__ == "__main__":
    main()
