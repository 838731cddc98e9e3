"""What would help where nothing can run, and how few devices the published rule should think of."""

from collections.abc import Sequence

from spotserve.controller.rehearsal import Machine
from spotserve.core.hardware import DeviceType, InstanceType
from spotserve.core.model import ModelSpec
from spotserve.planner.cost import replica_cost
from spotserve.planner.devices import INSTANCES, instance_type
from spotserve.planner.memory import USABLE_SHARE
from spotserve.planner.profiles import Profile
from spotserve.planner.shapes import grow
from spotserve.planner.workload import Objective, Workload

MOST_ADVISED = 64
"""Machines of one kind that are advised at most."""

OTHERS_NAMED = 2

PUBLISHED_MIN_DEVICES = {(32, 4096): 4, (44, 6144): 12, (48, 7168): 16}
"""By layers and width, of OPT-6.7B, GPT-20B and LLaMA-30B: the fewest T4 that serve them (SpotServe, ASPLOS'24, table 1)."""


def advice(model: ModelSpec, machines: Sequence[Machine], workload: Workload, max_batch: int) -> str:
    """How many machines of the kinds that were asked for a replica takes, and which others would do."""
    asked = {each.hardware.name: each.hardware for each in machines}
    counts = {kind: fewest(model, hardware, workload, max_batch) for kind, hardware in asked.items()}
    lines = [
        f"a replica takes {_machines(count, kind)}" if count is not None else f"{MOST_ADVISED} x {kind} are too few"
        for kind, count in counts.items()
    ]
    value_bytes = 4 if model.value_bytes >= 4 else 2
    others = ((kind, instance_type(kind, value_bytes=value_bytes)) for kind in INSTANCES if kind not in asked)
    found = ((fewest(model, hardware, workload, max_batch), kind) for kind, hardware in others)
    best = sorted((count, kind) for count, kind in found if count is not None)[:OTHERS_NAMED]
    told = f"; so do {' or '.join(_machines(count, kind) for count, kind in best)}" if best else ""
    return f"{', '.join(lines)}{told}"


def fewest(model: ModelSpec, hardware: InstanceType, workload: Workload, max_batch: int) -> int | None:
    """Machines of one kind that a replica takes; None: more than `MOST_ADVISED`. Where some are enough, more are."""
    low, high = 0, 1
    while not _fits(model, hardware, high, workload, max_batch):
        low, high = high, 2 * high
        if high > MOST_ADVISED:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _fits(model, hardware, middle, workload, max_batch) else (middle, high)
    return high


def _fits(model: ModelSpec, hardware: InstanceType, num_machines: int, workload: Workload, max_batch: int) -> bool:
    num_devices = num_machines * hardware.num_devices
    tree = grow(
        model,
        hardware,
        num_devices,
        workload,
        Objective(),
        speed_of=lambda parallel, its: replica_cost(model, parallel, its),
        max_batch=max_batch,
    )
    return bool(tree.shapes)


def _machines(count: int, kind: str) -> str:
    return f"{count} x {kind}"


def published_min_devices(profile: Profile, device: DeviceType) -> int:
    """Devices that a replica takes at least: as published, or else as many as hold the 32-bit weights of GPT's layers."""
    published = PUBLISHED_MIN_DEVICES.get((profile.num_layers, profile.hidden_size))
    if published is not None and device.name == "T4":
        return published
    weight_bytes = 4 * profile.num_layers * 12 * profile.hidden_size**2
    return -(-weight_bytes // int(USABLE_SHARE * device.memory_bytes))
