"""Bringing up slots in simulation: what a device lacks comes from other devices, then from files; then it says that it is ready.

Transfers are carried out as commands list them, device by device, each as soon as its ports are free. What was to come from a
machine that is lost meanwhile is read from files. A device keeps the weights it has until another slot of it is ready.

Owner of what is in the memory of every device. Knows no plans and no requests.
"""

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from spotserve.core.cluster import DeviceId
from spotserve.core.cut import units_held
from spotserve.core.messages import Activate, HeldSlot, SlotReady
from spotserve.core.model import ModelSpec
from spotserve.core.plan import Parallel, Slot
from spotserve.migration.slices import Pieces, count, layers_held, minus, portions_of, unit_bytes
from spotserve.replay.agenda import Agenda, Appointment
from spotserve.replay.ports import Ports
from spotserve.replay.scenario import Delays


@dataclass(slots=True, eq=False)
class _Load:
    """One slot that is being brought up."""

    command: Activate
    device: DeviceId
    file_bytes: int
    expected: list[tuple[str, float, int]] = field(default_factory=list)
    """(machine that sends, when it has been sent, bytes)."""
    began_s: float = 0.0
    ready: Appointment | None = None


class Loader:
    """The memory of all devices, and what is on its way into it."""

    def __init__(
        self, model: ModelSpec, agenda: Agenda, ports: Ports, delays: Delays, on_ready: Callable[[SlotReady], None]
    ) -> None:
        self._model = model
        self._agenda = agenda
        self._ports = ports
        self._delays = delays
        self._on_ready = on_ready
        self._held: dict[DeviceId, dict[Slot, Parallel]] = {}
        self._loads: dict[tuple[DeviceId, Slot], _Load] = {}
        self._served: dict[DeviceId, set[Slot]] = {}
        self.sent_bytes = 0
        """Between machines."""
        self.read_bytes = 0
        """From files."""

    def bring_up(self, commands: Sequence[Activate]) -> None:
        """Commands of one turn: their transfers share the ports from now on."""
        loads = []
        for command in commands:
            device = DeviceId(command.instance_id, command.device_index)
            held = [HeldSlot(device.index, slot, parallel) for slot, parallel in self._held.get(device, {}).items()]
            missing = missing_bytes(self._model, command.slot, command.replica.parallel, held)
            coming = sum(transfer.num_bytes for transfer in command.transfers)
            load = _Load(command, device, max(0, missing - coming), began_s=self._agenda.now_s)
            self._loads[device, command.slot] = load
            loads.append(load)
        self._send(loads)
        for load in loads:
            self._promise(load)

    def _send(self, loads: Sequence[_Load]) -> None:
        """Plans all transfers: whoever can begin earliest takes its ports first."""
        now_s = self._agenda.now_s
        queue = [(now_s, number, 0) for number, load in enumerate(loads) if load.command.transfers]
        heapq.heapify(queue)
        while queue:
            due_s, number, place = heapq.heappop(queue)
            load = loads[number]
            transfer = load.command.transfers[place]
            earliest_s = self._ports.earliest_s(transfer.source, load.device, load.expected[-1][1] if load.expected else now_s)
            if earliest_s > due_s:
                heapq.heappush(queue, (earliest_s, number, place))
                continue
            end_s = self._ports.send(transfer.source, load.device, transfer.num_bytes, due_s)
            load.expected.append((transfer.source.instance_id, end_s, transfer.num_bytes))
            if transfer.source.instance_id != load.device.instance_id:
                self.sent_bytes += transfer.num_bytes
            if place + 1 < len(load.command.transfers):
                heapq.heappush(queue, (end_s, number, place + 1))

    def _promise(self, load: _Load) -> None:
        """When the slot will be ready, as it looks now."""
        if load.ready is not None:
            load.ready.call_off()
        there_s = max([load.began_s, *(end_s for _, end_s, _ in load.expected)])
        read_s = load.file_bytes / self._delays.file_bytes_per_s
        load.ready = self._agenda.at(there_s + read_s + self._delays.bring_up_s, lambda: self._is_ready(load))

    def _is_ready(self, load: _Load) -> None:
        command = load.command
        del self._loads[load.device, command.slot]
        self.read_bytes += load.file_bytes
        served = self._served.setdefault(load.device, set())
        served.add(command.slot)
        held = self._held.setdefault(load.device, {})
        held[command.slot] = command.replica.parallel
        for slot in [slot for slot in held if slot not in served]:
            del held[slot]
        self._on_ready(
            SlotReady(
                instance_id=command.instance_id,
                device_index=command.device_index,
                slot=command.slot,
                plan_epoch=command.plan_epoch,
                model=self._model,
                pulled_bytes=sum(num_bytes for _, _, num_bytes in load.expected),
                invariant="batch",
            )
        )

    def leave(self, device: DeviceId, slot: Slot) -> None:
        """The device serves the slot no more, or does not bring it up; what weights it has stay."""
        self._served.get(device, set()).discard(slot)
        load = self._loads.pop((device, slot), None)
        if load is not None and load.ready is not None:
            load.ready.call_off()

    def lose(self, instance_id: str) -> None:
        """A machine is gone, with all that it holds and sends."""
        now_s = self._agenda.now_s
        for device in [device for device in self._held if device.instance_id == instance_id]:
            del self._held[device]
        for device in [device for device in self._served if device.instance_id == instance_id]:
            del self._served[device]
        for device, slot in [key for key in self._loads if key[0].instance_id == instance_id]:
            self.leave(device, slot)
        for load in self._loads.values():
            lost = [each for each in load.expected if each[0] == instance_id and each[1] > now_s]
            if lost:
                load.expected = [each for each in load.expected if each not in lost]
                load.file_bytes += sum(num_bytes for _, _, num_bytes in lost)
                load.began_s = now_s
                self._promise(load)
        self._ports.forget(instance_id)


def missing_bytes(model: ModelSpec, slot: Slot, parallel: Parallel, held: Iterable[HeldSlot]) -> int:
    """Weights of `slot` that a device lacks which has those of `held`."""
    there = [(layers_held(model, each.parallel, each.slot.stage), each.parallel.tensor, each.slot.shard) for each in held]
    total = 0
    for layer in layers_held(model, parallel, slot.stage):
        sources = [(tensor, shard) for layers, tensor, shard in there if layer in layers]
        for units, num_bytes in unit_bytes(portions_of(model, layer)).items():
            lacking: Pieces = (units_held(units, parallel.tensor, slot.shard),)
            for tensor, shard in sources:
                lacking = minus(lacking, units_held(units, tensor, shard))
            total += count(lacking) * num_bytes
    return total
