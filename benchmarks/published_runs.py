"""The experiments of SpotServe's paper as scenarios of a replay: its models, machines, traces and requests.

Inputs are those of Miao et al., ASPLOS'24, table 1 and section 6.1, and of the scripts of its artifact
(github.com/Hsword/SpotServe, branch artifact, 832b29f): machines of four T4 (g4dn.12xlarge) on 50 Gb/s, models in float32, prompts
of 512 and answers of 128 tokens. The data is not part of this project: `SPOTSERVE_DATA` names the folder with the published
profiles and traces.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from spotserve.core.hardware import DeviceType, InstanceType, Link
from spotserve.core.plan import Parallel
from spotserve.migration.spotserve_2024 import PublishedShape
from spotserve.planner.profile_speed import profile_speed, published_model
from spotserve.planner.profiles import Profile, read_profile
from spotserve.planner.speed import ReplicaSpeed
from spotserve.planner.workload import Lengths, Workload
from spotserve.replay.formats import parse_capacity, parse_requests, read_trace_text
from spotserve.replay.scenario import Delays, Prices, PublishedCase, Scenario
from spotserve.replay.timeline import Scaling, merge
from spotserve.replay.trace import CapacityEvent, CapacityTrace, RequestTrace, TraceRequest

PROMPT, OUTPUT = 512, 128
START_UP_S = 120.0
SPOT_USD, ON_DEMAND_USD = 1.9046, 3.912
MEMORY_SHARE = 0.9
"""Of a device, for weights and KV."""
PROFILED_BATCH = 8
"""The largest batch that profiles measured."""


@dataclass(frozen=True, slots=True)
class PaperModel:
    """A model of table 1, and how the artifact's scripts run it."""

    profile: str
    vocabulary_size: int
    min_devices: int
    max_tensor: int
    required_rps: float
    rate_rps: float
    queries: str


MODELS = {
    "6.7B": PaperModel("megatron_6.7B_profile.json", 51200, 4, 16, 2.0, 1.5, "query6144_tpt1.5_cv6.txt"),
    "20B": PaperModel("megatron_h6144_profile.json", 51200, 12, 8, 0.4, 0.35, "query_tpt0.35_cv6.txt"),
    "30B": PaperModel("megatron_h7168_profile.json", 50304, 16, 8, 0.2, 0.2, "query_tpt0.2_cv6.txt"),
}
SEGMENTS = {"A_S": "trace_0304_real", "B_S": "trace_0506_real", "A_S+O": "trace_0304_ondemand", "B_S+O": "trace_0506_ondemand"}
WHOLE = "g4dn"


def data_folder() -> Path:
    """Where the public data lies."""
    return Path(os.environ.get("SPOTSERVE_DATA", Path(__file__).parents[2] / "shared" / "data"))


def profile_of(model: PaperModel) -> Profile:
    """Its measured times."""
    path = data_folder() / "profiles" / "spotserve" / "T4-4x" / model.profile
    return read_profile(path.read_bytes(), str(path))


def machine() -> InstanceType:
    """g4dn.12xlarge (AWS): four T4 of 16 GB on PCIe 3.0; by the artifact the inside of a machine is as fast as its network."""
    t4 = DeviceType(name="T4", memory_bytes=16 * 10**9, flops_per_s=8.1e12, memory_bytes_per_s=320e9, layer_overhead_s=0.0)
    link = Link(0.0, 50e9 / 8)
    return InstanceType(
        name="g4dn.12xlarge",
        device=t4,
        num_devices=4,
        device_link=link,
        network=link,
        host_memory_bytes=192 * 2**30,
        host_link=Link(0.0, 12e9),
    )


def fleet_of(name: str) -> CapacityTrace:
    """One of the paper's segments, or the whole trace; an `add` is the launch of a machine, which is up `START_UP_S` later.
    Segments say when machines are up, so their adds are set earlier."""
    folder = data_folder() / "traces" / "spot" / "spotserve"
    if name == WHOLE:
        return parse_capacity(read_trace_text(folder / "g4dn.csv"), "g4dn.csv")
    path = folder / "trace_seg" / f"{SEGMENTS[name]}.txt"
    trace = parse_capacity(read_trace_text(path), path.name)
    launched = (
        replace(event, time_s=event.time_s - START_UP_S) if event.change == "add" and event.time_s >= START_UP_S else event
        for event in trace.events
    )
    return replace(trace, events=tuple(sorted(launched, key=lambda event: event.time_s)))


def steady(machines: int, duration_s: float) -> CapacityTrace:
    """A fleet that stays."""
    events = tuple(CapacityEvent(0.0, "add", f"node-{index}") for index in range(machines))
    return CapacityTrace(events, "steady", end_s=duration_s, is_ended=True)


def published_requests(model: PaperModel) -> RequestTrace:
    """The paper's own arrivals: nearly constant, whatever their files' names say."""
    path = data_folder() / "traces" / "requests" / "spotserve-queries" / model.queries
    return parse_requests(read_trace_text(path), path.name)


def gamma_requests(model: PaperModel, duration_s: float, gap_cv: float, seed: int) -> RequestTrace:
    """Arrivals of the same mean rate with gaps of a true coefficient of variation."""
    random = Random(f"{gap_cv} {seed}")
    shape = 1 / gap_cv**2
    requests: list[TraceRequest] = []
    now_s = 0.0
    while True:
        now_s += random.gammavariate(shape, 1 / (model.rate_rps * shape))
        if now_s >= duration_s:
            return RequestTrace(tuple(requests), "gamma")
        requests.append(TraceRequest(round(now_s, 6), PROMPT, OUTPUT))


def even_requests(model: PaperModel, duration_s: float) -> RequestTrace:
    """One after the other at equal distances, for as long as it takes: the paper's files end after an hour."""
    count = int(duration_s * model.rate_rps)
    return RequestTrace(tuple(TraceRequest((index + 0.5) / model.rate_rps, PROMPT, OUTPUT) for index in range(count)), "even")


def scenario_of(
    name: str, fleet: CapacityTrace, load: RequestTrace, *, gap_cv: float, seed: int = 0, run_as_published: bool = True
) -> Scenario:
    """What every policy is given: the paper's hardware by its measured times, and the load that it is told of. Static batches take
    the time of the published formula, or with `run_as_published` off what their prompts were measured to take."""
    model = MODELS[name]
    profile = profile_of(model)
    context = PROMPT + OUTPUT
    spec = published_model(profile, vocabulary_size=model.vocabulary_size, context_tokens=context)

    def speed_of(parallel: Parallel, hardware: InstanceType) -> ReplicaSpeed | str:
        memory_bytes = round(MEMORY_SHARE * hardware.device.memory_bytes)
        return profile_speed(profile, parallel, model=spec, device_memory_bytes=memory_bytes, min_devices=model.min_devices)

    shape = PublishedShape(profile.num_layers, profile.padded_layers, profile.hidden_size, model.vocabulary_size, positions=context)
    return Scenario(
        timeline=merge(fleet, load, Scaling(grace_s=30.0, seed=seed, duration_s=_length_s(fleet))),
        model=spec,
        machine=machine(),
        prices=Prices(spot_usd_per_hour=SPOT_USD, on_demand_usd_per_hour=ON_DEMAND_USD),
        delays=Delays(start_up_s=START_UP_S),
        speed_of=speed_of,
        published=PublishedCase(
            profile=profile,
            shape=shape,
            required_rps=model.required_rps,
            min_devices=model.min_devices,
            max_tensor=min(model.max_tensor, max(profile.tensors)),
            run_as_published=run_as_published,
        ),
        workload=Workload(model.rate_rps, Lengths.fixed(PROMPT), Lengths.fixed(OUTPUT), gap_cv=gap_cv),
        max_batch=PROFILED_BATCH,
        falls_back=False,
        most_machines=12,
        seed=seed,
    )


def _length_s(fleet: CapacityTrace) -> float:
    return fleet.end_s if fleet.end_s is not None else fleet.events[-1].time_s


def published_percentile(values_s: Sequence[float], share: float) -> float:
    """As the artifact's scripts take it: the value at place int(share * n)."""
    return sorted(values_s)[int(share * len(values_s))]
