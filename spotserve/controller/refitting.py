"""Kinds of machines as they are seen to be: what was measured when a worker started, refitted to what steps and moves take.

Steps teach the three constants of a device, moves of KV the network between machines. Only replicas on one device are asked: what a
step of several takes is theirs and their links' together. Numbers are told with three digits, so that plans do not change with the
noise of the fourth.
"""

from collections import defaultdict, deque

import msgspec

from spotserve.controller.fleet import Fleet
from spotserve.core.cluster import ReplicaState
from spotserve.core.hardware import DeviceType, InstanceType, Link
from spotserve.core.messages import Heartbeat, SequenceMoved
from spotserve.core.model import ModelSpec
from spotserve.planner.calibration import LinkSample, Refit, Sample, fit_link

LOOK_S = 1.0
"""One step of each kind of machine is looked at in so long."""

MOVES_KEPT = 64
LEAST_MOVES = 8
"""Of KV, before anything is believed of the network; it is fitted anew each time that so many more have come."""


class Refits:
    """One for a fleet, whose kinds of machines it keeps up to date."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._measured: dict[str, InstanceType] = {}
        self._refits: dict[str, Refit] = {}
        self._next_look_s: dict[str, float] = {}
        self._moves: defaultdict[str, deque[LinkSample]] = defaultdict(lambda: deque(maxlen=MOVES_KEPT))
        self._unfitted: defaultdict[str, int] = defaultdict(int)

    def measured(self, hardware: InstanceType) -> None:
        """A worker says what its machine is. What is known of that kind already and was refitted stands."""
        if self._measured.get(hardware.name) != hardware:
            self._measured[hardware.name] = hardware
            self._refits[hardware.name] = Refit(hardware.device)
            self._fleet.hardware[hardware.name] = hardware

    def note_step(self, heartbeat: Heartbeat, now_s: float) -> None:
        """A worker says how long its steps take now."""
        instance = self._fleet.instances.get(heartbeat.instance_id)
        model = self._fleet.model
        if instance is None or model is None or heartbeat.running == 0 or heartbeat.step_s <= 0:
            return
        kind = instance.instance_type
        if kind not in self._refits or now_s < self._next_look_s.get(kind, now_s):
            return
        self._next_look_s[kind] = now_s + LOOK_S
        led = [each for each in self._fleet.replicas_on(instance.instance_id) if each.state is not ReplicaState.LOADING]
        if len(led) != 1 or led[0].plan.parallel.num_slots > 1:
            return
        self._refits[kind].observe(_sample(heartbeat, model))
        self._tell(kind, device=_rounded(self._refits[kind].device))

    def note_move(self, moved: SequenceMoved) -> None:
        """A sequence went to another machine."""
        instance = self._fleet.instances.get(moved.instance_id)
        if instance is None or instance.instance_type not in self._measured or moved.kv_bytes <= 0 or moved.seconds <= 0:
            return
        kind = instance.instance_type
        self._moves[kind].append(LinkSample(moved.kv_bytes, moved.seconds))
        self._unfitted[kind] += 1
        if self._unfitted[kind] >= LEAST_MOVES:
            self._unfitted[kind] = 0
            fitted = fit_link(tuple(self._moves[kind]), self._measured[kind].network)
            self._tell(kind, network=Link(_digits(fitted.latency_s), _digits(fitted.bytes_per_s)))

    def _tell(self, kind: str, **different: DeviceType | Link) -> None:
        self._fleet.hardware[kind] = msgspec.structs.replace(self._fleet.hardware[kind], **different)


def _sample(heartbeat: Heartbeat, model: ModelSpec) -> Sample:
    """A decode step of all running sequences on one device."""
    context = heartbeat.kv_tokens_used
    attention = 4 * model.num_heads * model.head_size * context * model.num_layers
    each = model.num_layers * model.layer_flops_per_token + model.head_flops_per_token
    weights = model.num_layers * model.layer_bytes + model.head_bytes
    return Sample(
        flops=heartbeat.running * each + attention,
        num_bytes=weights + context * model.kv_bytes_per_token,
        num_layers=model.num_layers,
        seconds=heartbeat.step_s,
    )


def _rounded(device: DeviceType) -> DeviceType:
    return msgspec.structs.replace(
        device,
        flops_per_s=_digits(device.flops_per_s),
        memory_bytes_per_s=_digits(device.memory_bytes_per_s),
        layer_overhead_s=_digits(device.layer_overhead_s),
    )


def _digits(value: float) -> float:
    return float(f"{value:.3g}")
