"""How far a simulated replay is off: the same traces, simulated and against a local cluster, measure by measure.

    python benchmarks/fidelity.py [--json]

A cluster of two instances (one processor core each, of a machine with two) serves three made traces, each with machines that are
taken, with notice and without. Before that it serves two undisturbed ones, the first to warm up; on the second the constants of the
replica's speed are fitted (time of a step, of a sequence in it, of a prompt token, of the way of a request), as a profile is
measured on GPUs; how long machines take to start is measured. Nothing of the three judged runs is fitted. The error is
simulated / live - 1.
"""

import argparse
import asyncio
import json
from dataclasses import dataclass, replace
from math import log
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table
from scipy.optimize import minimize

from spotserve.cli.local import own_cluster
from spotserve.cli.plan_inputs import read_model
from spotserve.config import LocalCloudSettings
from spotserve.core.hardware import DeviceType, InstanceType, Link
from spotserve.core.plan import Parallel
from spotserve.planner.speed import ReplicaSpeed
from spotserve.replay import live
from spotserve.replay.generate import FleetModel, LoadModel, fleet_events, load_requests
from spotserve.replay.lived import lived
from spotserve.replay.measures import Measures, measure
from spotserve.replay.ours import play_production
from spotserve.replay.record import RunRecord
from spotserve.replay.run import ReplayOptions, connected, driven_by_trace
from spotserve.replay.scenario import Delays, Prices, Scenario, show_nothing
from spotserve.replay.summary import Objectives
from spotserve.replay.timeline import Scaling, Timeline, merge
from spotserve.replay.trace import CapacityTrace, RequestTrace

INSTANCES = 2
LENGTH_S = 75.0
GRACE_S = 3.0
SEEDS = (3, 4, 5)
RATE_RPS = 2.0
OBJECTIVES = Objectives(ttft_s=0.5, tpot_s=0.05)
COMPARED = (
    *(f"{name}_p{percent}_s" for name in ("ttft", "tpot", "e2e") for percent in (50, 90, 99)),
    "goodput_share",
    "requests_lost",
    "requests_interrupted",
)


@dataclass(frozen=True)
class FittedSpeed:
    """A replica of the local cluster by a few constants; a `ReplicaSpeed`."""

    step_s: float
    sequence_s: float
    prompt_token_s: float
    way_s: float
    """From a client to its first step, and back."""
    max_batch: int = 32
    kv_tokens: int = 32_768

    def token_s(self, sequences: float, context_tokens: float) -> float:
        """See `ReplicaSpeed`."""
        del context_tokens
        return self.step_s + self.sequence_s * sequences

    def prompt_s(self, tokens: float) -> float:
        """See `ReplicaSpeed`."""
        return self.prompt_token_s * tokens

    def first_token_s(self, tokens: float) -> float:
        """See `ReplicaSpeed`."""
        return self.way_s + self.prompt_token_s * tokens


def timeline_of(seed: int, *, is_disturbed: bool) -> Timeline:
    """A minute and a quarter of requests, on machines that are taken or not."""
    load = load_requests(
        LoadModel(
            duration_s=LENGTH_S,
            rate_per_s=RATE_RPS,
            prompt_median=140,
            prompt_low=60,
            prompt_high=250,
            output_median=200,
            output_low=80,
            output_high=400,
            length_sigma=0.4,
            seed=seed,
        )
    )
    fleet = fleet_events(
        FleetModel(instances=INSTANCES, duration_s=LENGTH_S, mean_life_s=30, mean_restock_s=3, keep=1, bulk_share=0.0, seed=seed)
    )
    events = fleet if is_disturbed else fleet[:INSTANCES]
    scaling = Scaling(grace_s=GRACE_S, notice_share=0.5, duration_s=LENGTH_S, seed=seed)
    return merge(CapacityTrace(events, "made"), RequestTrace(load, "made"), scaling)


async def run_live(url: str, secret: str, timelines: list[Timeline]) -> list[RunRecord]:
    """Each timeline against the cluster."""
    with TemporaryDirectory() as folder:
        options = ReplayOptions(url=url, secret=secret, out=Path(folder), requests=Path(folder))
        async with connected(options, Console(stderr=True)) as system, driven_by_trace(system, options.prices):
            runs = []
            for number, timeline in enumerate(timelines):
                runs.append(await live.carry_out(timeline, system, label=f"live {number}", patience_s=120.0))
            return runs


def simulated(timeline: Timeline, speed: FittedSpeed, start_up_s: float, bring_up_s: float) -> Measures:
    """The same timeline without machines."""
    device = DeviceType(name="cpu", memory_bytes=4 * 10**9, flops_per_s=1e11, memory_bytes_per_s=1e10, layer_overhead_s=0.0)
    machine = InstanceType(
        name="local",
        device=device,
        num_devices=1,
        device_link=Link(0.0, 1e9),
        network=Link(2e-3, 4e8),
        host_memory_bytes=4 * 10**9,
        host_link=Link(0.0, 1e9),
    )

    def speed_of(parallel: Parallel, hardware: InstanceType) -> ReplicaSpeed | str:
        del hardware
        return speed if parallel.num_slots == 1 else "one device each"

    scenario = Scenario(
        timeline=timeline,
        model=MODEL,
        machine=machine,
        prices=Prices(spot_usd_per_hour=1.0, on_demand_usd_per_hour=2.0),
        delays=Delays(start_up_s=start_up_s, file_bytes_per_s=1e9, bring_up_s=bring_up_s, loss_heard_s=0.05),
        speed_of=speed_of,
        max_batch=32,
        grace_s=GRACE_S,
    )
    settings = {"planning": "shape", "pipeline": 1, "tensor": 1}
    played = play_production(scenario, show_nothing, policy="spotserve", settings=settings)
    return measure(played, OBJECTIVES)


def fitted(timeline: Timeline, measured: Measures) -> FittedSpeed:
    """The constants with which the undisturbed run comes out best."""
    names = [f"{name}_{what}_s" for name in ("ttft", "tpot", "e2e") for what in ("mean", "p50", "p90")]

    def off(values: list[float]) -> float:
        speed = FittedSpeed(*(abs(value) for value in values))
        found = simulated(timeline, speed, 3.0, 0.5)
        return sum(log(float(found[name] or 1e-9) / float(measured[name] or 1e-9)) ** 2 for name in names)

    starts = ([0.002, 0.002, 0.0002, 0.02], [0.004, 0.0005, 0.0002, 0.02], [0.008, 0.001, 0.0001, 0.05])
    tried = [minimize(off, start, method="Nelder-Mead", options={"maxiter": 250, "xatol": 1e-7, "fatol": 1e-6}) for start in starts]
    best = min(tried, key=lambda each: float(each.fun))
    return FittedSpeed(*(abs(float(value)) for value in best.x))


def delays_of(runs: list[RunRecord]) -> tuple[float, float]:
    """Medians: from a launch until a worker takes commands, and from there until its replica serves."""
    starts, brings = [], []
    for run in runs:
        seen: dict[str, dict[str, float]] = {}
        for event in run.fleet_events:
            if event.instance is not None:
                seen.setdefault(event.instance, {}).setdefault(event.kind, event.time_s)
        for kinds in seen.values():
            if "launched" in kinds and "registered" in kinds:
                starts.append(kinds["registered"] - kinds["launched"])
                if "ready" in kinds:
                    brings.append(kinds["ready"] - kinds["registered"])
    return (sorted(starts)[len(starts) // 2] if starts else 3.0, sorted(brings)[len(brings) // 2] if brings else 0.5)


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="for scripts")
    as_json = parser.parse_args().json
    warm_up, steady = (timeline_of(seed, is_disturbed=False) for seed in (1, 2))
    judged = [timeline_of(seed, is_disturbed=True) for seed in SEEDS]
    with own_cluster(0, INSTANCES) as (url, secret):
        runs = asyncio.run(run_live(url, secret, [warm_up, steady, *judged]))[1:]
    measured = [measure(lived(run, LocalCloudSettings(), duration_s=LENGTH_S, seed=0), OBJECTIVES) for run in runs]
    start_up_s, bring_up_s = delays_of(runs)
    speed = fitted(_as_sent(steady, runs[0]), measured[0])
    rows = []
    for number, (timeline, run, told) in enumerate(zip([steady, *judged], runs, measured, strict=True)):
        found = simulated(_as_sent(timeline, run), speed, start_up_s, bring_up_s)
        for name in COMPARED:
            simulated_value, live_value = float(found[name] or 0.0), float(told[name] or 0.0)
            error = simulated_value / live_value - 1 if live_value else None
            trace = "undisturbed (fitted)" if number == 0 else f"trace {number}"
            rows.append({"trace": trace, "measure": name, "simulated": simulated_value, "live": live_value, "error": error})
    constants = {"speed": str(speed), "start_up_s": start_up_s, "bring_up_s": bring_up_s}
    if as_json:
        print(json.dumps({**constants, "rows": rows}))
        return
    console = Console(width=120)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for head in ("trace", "measure", "simulated", "live", "error"):
        table.add_column(head, justify="left" if head in ("trace", "measure") else "right")
    for row in rows:
        error = row["error"]
        told_error = "-" if not isinstance(error, float) else f"{100 * error:+.1f} %"
        table.add_row(str(row["trace"]), str(row["measure"]), f"{row['simulated']:.4g}", f"{row['live']:.4g}", told_error)
    console.print(constants)
    console.print(table)


def _as_sent(timeline: Timeline, run: RunRecord) -> Timeline:
    """The lengths that the system saw: prompts by its own count, answers as long as they became."""
    seen = {record.arrival.index: record for record in run.requests}

    def adjusted(action: object) -> object:
        record = seen.get(getattr(action, "index", -1))
        if record is None or not record.complete:
            return action
        return replace(action, prompt_tokens=record.prompt_tokens or 1, output_tokens=len(record.token_ids))  # type: ignore[type-var]

    return replace(timeline, actions=tuple(adjusted(action) for action in timeline.actions))  # type: ignore[misc]


MODEL = read_model(str(Path(__file__).parents[1] / "spotserve" / "demo" / "models" / "target"), "float32")

if __name__ == "__main__":
    main()
