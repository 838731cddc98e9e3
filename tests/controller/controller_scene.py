"""A controller's state among scripted machines that do what they are told: what it commands, and what comes back."""

from dataclasses import dataclass, field

from model_specs import small_spec
from msgspec.structs import replace

from spotserve.config import ControllerSettings
from spotserve.controller.hedging import Place
from spotserve.controller.proposals import EngineTerms
from spotserve.controller.state import ControllerState
from spotserve.core.cluster import DeviceId, InstanceState, Notice, NoticeKind, ReplicaState
from spotserve.core.cut import EMBEDDING, head_of, stage_cuts, units_held
from spotserve.core.hardware import InstanceType
from spotserve.core.messages import (
    TERMINATED,
    Activate,
    Address,
    Command,
    Deactivate,
    Drain,
    Drained,
    Event,
    Heartbeat,
    HeldSlot,
    InstanceLaunched,
    InstanceLost,
    Launch,
    LaunchRefused,
    NoticeReceived,
    Registered,
    Reshape,
    SequenceReport,
    SlotFailed,
    SlotReady,
    Terminate,
    Tick,
    Undrain,
)
from spotserve.core.model import Portion
from spotserve.core.plan import ReplicaPlan, Slot

MODEL = small_spec(
    name="tiny",
    num_layers=4,
    num_kv_heads=2,
    head_size=8,
    vocabulary_size=100,
    context_tokens=512,
    layer=(Portion(4, 800), Portion(2, 600), Portion(1, 50)),
    embedding=(Portion(1, 400),),
    head=(Portion(1, 20), Portion(4, 400)),
    value_bytes=4,
)

PRICES = {"a": (1.3, 3.9), "b": (1.4, 3.8)}
"""Of each zone: spot and on demand."""

PLACES = tuple(Place(name, *prices) for name, prices in PRICES.items())

Byte = tuple[int, int, int]
"""Layer, index of the portion, unit: what weights are made of."""


def bytes_of_slot(slot: Slot, pipeline: int, tensor: int) -> dict[Byte, int]:
    """Everything that a slot holds of `MODEL`, unit by unit, and its size."""
    layers = list(stage_cuts(MODEL, pipeline)[slot.stage])
    layers += [EMBEDDING] if slot.stage == 0 else []
    layers += [head_of(MODEL)] if slot.stage == pipeline - 1 else []
    kinds = {EMBEDDING: MODEL.embedding, head_of(MODEL): MODEL.head}
    return {
        (layer, index, unit): portion.num_bytes // portion.units
        for layer in layers
        for index, portion in enumerate(kinds.get(layer, MODEL.layer))
        for unit in units_held(portion.units, tensor, slot.shard)
    }


def heartbeat(instance: str, *sequences: SequenceReport, kv_tokens_used: int = 0) -> Heartbeat:
    return Heartbeat(
        instance_id=instance,
        running=len(sequences),
        waiting=0,
        kv_tokens_used=kv_tokens_used,
        kv_tokens_total=4096,
        step_s=0.01,
        prefill_tokens_per_s=1000.0,
        store_healthy=True,
        sequences=sequences,
    )


def kinds(commands: list[Command]) -> list[str]:
    return [type(command).__name__ for command in commands]


@dataclass
class Machine:
    """One instance as it really is."""

    instance_id: str
    num_devices: int
    hardware: InstanceType | None = None
    """What it says it is."""
    slots: dict[Slot, Activate] = field(default_factory=dict)
    """Up or coming up."""
    up: set[Slot] = field(default_factory=set)
    idle: dict[int, Activate] = field(default_factory=dict)
    """Weights of the last slot that a device has left, while it has no other."""
    is_gone: bool = False
    spot: bool = True
    zone: str = "z"

    def up_on(self, device: int) -> list[Slot]:
        return [slot for slot in self.up if self.slots[slot].device_index == device]

    def held_by(self, device: int) -> list[Activate]:
        return [self.slots[slot] for slot in self.up_on(device)] or ([self.idle[device]] if device in self.idle else [])

    def leave(self, slot: Slot) -> None:
        activate = self.slots.pop(slot, None)
        if activate is not None and slot in self.up:
            self.up.discard(slot)
            if not self.up_on(activate.device_index):
                self.idle[activate.device_index] = activate

    def become_ready(self, slot: Slot) -> Activate:
        activate = self.slots[slot]
        self.up.add(slot)
        self.idle.pop(activate.device_index, None)
        return activate

    def registered(self) -> Registered:
        number = int(self.instance_id.removeprefix("i-"))
        held = [self.slots[slot] for slot in sorted(self.up)] + list(self.idle.values())
        return Registered(
            instance_id=self.instance_id,
            address=Address("127.0.0.1", 1000 + number),
            pid=number,
            ranks=tuple(rank_of(DeviceId(self.instance_id, index)) for index in range(self.num_devices)),
            spot=self.spot,
            zone=self.zone,
            replicas=tuple(self.slots[slot].replica for slot in sorted(self.up)),
            held=tuple(HeldSlot(each.device_index, each.slot, each.replica.parallel) for each in held),
            model=MODEL if held or self.hardware else None,
            hardware=self.hardware,
        )


def rank_of(device: DeviceId) -> Address:
    return Address("127.0.0.1", 10_000 + 100 * int(device.instance_id.removeprefix("i-")) + device.index)


class World:
    """A state with a clock, the machines it commands, and their answers, which arrive when a test says so."""

    def __init__(
        self, data: int | None = None, pipeline: int = 1, tensor: int = 1, *, max_batch: int = 8, **settings: object
    ) -> None:
        shape = {"data": data, "pipeline": pipeline, "tensor": tensor}
        self.settings = ControllerSettings.model_validate({**shape, **settings})
        self.max_batch = max_batch
        self.kv_tokens: int | None = None
        self.hardware: InstanceType | None = None
        """What machines say they are, unless a test says otherwise."""
        self.begin()
        self.now_s = 1000.0
        self.machines: dict[str, Machine] = {}
        self.draining: dict[str, Drain] = {}
        """By replica: drains that are not answered yet."""
        self.broken: set[str] = set()
        """Replicas of which a slot has failed: the other slots will fail, too."""
        self.drains: list[Drain] = []
        self.asked: list[Launch] = []
        """What the cloud was asked for and has not answered, one by one."""
        self.given_back: list[str] = []
        """Machines that the cloud is to end and has not ended."""
        self.num_delivered = 0

    def begin(self) -> None:
        """A controller that knows nothing yet."""
        terms = EngineTerms(self.max_batch, kv_tokens=self.kv_tokens, step_tokens=1)
        self.state = ControllerState(self.settings, terms, PLACES)

    # ------------------------------------------------------------------ what happens

    def hear(self, event: Event) -> list[Command]:
        """Tells the state, and has the machines do what it commands."""
        commands = self.state.handle(event, self.now_s)
        for command in commands:
            instance_id = getattr(command, "instance_id", None)
            if isinstance(command, Activate | Deactivate | Drain | Undrain):
                assert not self.machines[command.instance_id].is_gone, f"{instance_id} is gone and was told {command}"
            self._obey(command)
        return commands

    def launch(self, instance: str) -> list[Command]:
        commands = self.hear(InstanceLaunched(instance_id=instance, spot=True, zone="z", usd_per_hour=1.0))
        self.now_s += 1.0
        return commands

    def join(self, instance: str, devices: int = 1, hardware: InstanceType | None = None) -> list[Command]:
        """A machine is launched and registers."""
        self.launch(instance)
        return self.register(instance, devices, hardware)

    def register(self, instance: str, devices: int = 1, hardware: InstanceType | None = None) -> list[Command]:
        """A machine connects to the controller. What it was still bringing up, for an earlier one, it gives up."""
        its = hardware or self.hardware
        machine = self.machines.setdefault(instance, Machine(instance, devices if its is None else its.num_devices, its))
        machine.slots = {slot: activate for slot, activate in machine.slots.items() if slot in machine.up}
        return self.hear(machine.registered())

    def deliver(self) -> str:
        """The cloud starts what it was asked for longest ago, and its worker registers; its id."""
        wish = self.asked.pop(0)
        self.num_delivered += 1
        instance = f"i-{100 + self.num_delivered}"
        assert wish.zone is not None
        self.machines[instance] = Machine(instance, 1, spot=wish.spot, zone=wish.zone)
        price = PRICES[wish.zone][0 if wish.spot else 1]
        self.hear(InstanceLaunched(instance_id=instance, spot=wish.spot, zone=wish.zone, usd_per_hour=price))
        self.now_s += 1.0
        self.register(instance)
        return instance

    def refuse(self) -> list[Command]:
        """The cloud refuses what it was asked for longest ago."""
        wish = self.asked.pop(0)
        return self.hear(LaunchRefused(count=1, spot=wish.spot, zone=wish.zone, reason="no capacity"))

    def end_given_back(self) -> str:
        """The cloud ends a machine that was given back; its id."""
        instance = self.given_back.pop(0)
        if instance in self.machines:
            self.machines[instance].is_gone = True
        self.draining = {name: drain for name, drain in self.draining.items() if drain.instance_id != instance}
        self.hear(InstanceLost(instance_id=instance, reason=TERMINATED))
        return instance

    def provide_all(self) -> list[str]:
        """The cloud does everything that it is asked for, and machines all that they are told; ids of what was delivered."""
        delivered = []
        while self.asked or self.given_back or self.coming() or self.draining:
            if self.asked:
                delivered.append(self.deliver())
            elif self.given_back:
                self.end_given_back()
            else:
                self.answer_all()
        return delivered

    def serve(self, *instances: str, devices: int = 1) -> list[Command]:
        """Machines join, and bring up what they are told to."""
        for instance in instances:
            self.join(instance, devices)
        return self.answer_all()

    def coming(self) -> list[tuple[Machine, Slot]]:
        """Slots that are being brought up."""
        found = [(machine, slot) for machine in self.machines.values() for slot in machine.slots if slot not in machine.up]
        return sorted([each for each in found if not each[0].is_gone], key=lambda each: each[1])

    def become_ready(self, machine: Machine, slot: Slot) -> list[Command]:
        activate = machine.become_ready(slot)
        return self.hear(
            SlotReady(
                instance_id=machine.instance_id,
                device_index=activate.device_index,
                slot=slot,
                plan_epoch=activate.plan_epoch,
                model=MODEL,
                pulled_bytes=sum(transfer.num_bytes for transfer in activate.transfers),
                invariant="batch",
            )
        )

    def fail(self, machine: Machine, slot: Slot, *, is_permanent: bool = False) -> list[Command]:
        activate = machine.slots[slot]
        machine.leave(slot)
        self.broken.add(slot.replica_id)
        return self.hear(
            SlotFailed(
                instance_id=machine.instance_id,
                device_index=activate.device_index,
                slot=slot,
                plan_epoch=activate.plan_epoch,
                reason="no such file" if is_permanent else "a peer was lost",
                is_permanent=is_permanent,
            )
        )

    def become_empty(self, replica_id: str) -> list[Command]:
        drain = self.draining.pop(replica_id)
        return self.hear(Drained(instance_id=drain.instance_id, replica_id=replica_id))

    def answer_all(self) -> list[Command]:
        """Everything that was asked for is answered, until nothing is left to answer; the last turn's commands."""
        commands: list[Command] = []
        while (coming := self.coming()) or self.draining:
            commands = self.become_ready(*coming[0]) if coming else self.become_empty(next(iter(self.draining)))
        return commands

    def notice(self, instance: str, grace_s: float, kind: NoticeKind = NoticeKind.HARD) -> list[Command]:
        return self.hear(NoticeReceived(notice=Notice(instance_id=instance, deadline_s=self.now_s + grace_s, kind=kind)))

    def lose(self, instance: str) -> list[Command]:
        machine = self.machines.get(instance)
        if machine is not None:
            machine.is_gone = True
        self.draining = {name: drain for name, drain in self.draining.items() if drain.instance_id != instance}
        return self.hear(InstanceLost(instance_id=instance, reason="preempted"))

    def reshape(self, data: int | None, pipeline: int | None, tensor: int | None) -> list[Command]:
        return self.hear(Reshape(data=data, pipeline=pipeline, tensor=tensor))

    def wait(self, seconds: float) -> list[Command]:
        """Time passes, in small steps; every machine goes on giving signs of life. All that is commanded meanwhile."""
        commands: list[Command] = []
        until_s = self.now_s + seconds
        while self.now_s < until_s - 1e-9:
            self.now_s = min(until_s, self.now_s + 1.0)
            for instance in self.state.instances.values():
                if instance.address is not None and instance.state is not InstanceState.GONE:
                    beat = instance.heartbeat or heartbeat(instance.instance_id)
                    commands += self.hear(beat)
            commands += self.hear(Tick())
        return commands

    def restart(self) -> None:
        """Another controller takes over, knowing nothing. What was being brought up or had broken is given up by then."""
        for machine in self.machines.values():
            for slot in tuple(machine.slots):
                if slot not in machine.up:
                    del machine.slots[slot]
                elif slot.replica_id in self.broken:
                    machine.leave(slot)
        self.draining.clear()
        self.begin()

    # ------------------------------------------------------------------ what can be seen

    def in_state(self, state: ReplicaState) -> list[str]:
        return [route.replica_id for route in self.state.routing_table().replicas if route.state is state]

    def serving(self) -> list[str]:
        return self.in_state(ReplicaState.SERVING)

    def shapes(self) -> list[tuple[int, int]]:
        """Stages and shards of the replicas that serve."""
        plans: list[ReplicaPlan] = [replica.plan for replica in self.state.replicas.values()]
        return [
            (each.parallel.pipeline, each.parallel.tensor)
            for each in plans
            if self.state.replicas[each.replica_id].state is ReplicaState.SERVING
        ]

    def weights_on(self, device: DeviceId) -> set[Byte]:
        """What a device has in memory."""
        machine = self.machines[device.instance_id]
        parts = (
            bytes_of_slot(each.slot, each.replica.parallel.pipeline, each.replica.parallel.tensor)
            for each in machine.held_by(device.index)
        )
        return {byte for part in parts for byte in part}

    # ------------------------------------------------------------------ inner

    def _obey(self, command: Command) -> None:
        match command:
            case Activate():
                machine = self.machines[command.instance_id]
                device = DeviceId(command.instance_id, command.device_index)
                others = [each for each in machine.slots.values() if each.device_index == command.device_index]
                assert len(others) <= 1 and {each.slot for each in others} <= machine.up, f"{device} has {others}"
                assert command.device_index < machine.num_devices
                devices = [member.device for member in command.members]
                assert len(set(devices)) == len(devices) == command.replica.parallel.num_slots
                assert [member.slot for member in command.members] == list(command.replica.slots)
                assert all(member.rank == rank_of(member.device) for member in command.members)
                assert dict(zip(command.replica.slots, devices, strict=True))[command.slot] == device
                self._check_transfers(command, device)
                machine.slots[command.slot] = command
            case Deactivate():
                self.machines[command.instance_id].leave(command.slot)
                self.draining.pop(command.slot.replica_id, None)
            case Drain():
                self.draining[command.replica_id] = command
                self.drains.append(command)
            case Undrain():
                self.draining.pop(command.replica_id, None)
            case Launch():
                self.asked += [replace(command, count=1)] * command.count
            case Terminate():
                self.given_back.append(command.instance_id)

    def _check_transfers(self, activate: Activate, device: DeviceId) -> None:
        """Every byte that is missing and that somebody has who stays is taken from somebody, once; what would come too late from
        machines that go is read from files."""
        parallel = activate.replica.parallel
        wanted = bytes_of_slot(activate.slot, parallel.pipeline, parallel.tensor)
        missing = wanted.keys() - self.weights_on(device)
        for transfer in activate.transfers:
            assert transfer.rank == rank_of(transfer.source) and transfer.source != device
            assert not self.machines[transfer.source.instance_id].is_gone
            taken = {byte for byte in missing & self.weights_on(transfer.source) if byte[0] == transfer.layer}
            assert transfer.num_bytes == sum(wanted[byte] for byte in taken) > 0
            missing -= taken
        reachable = [
            DeviceId(machine.instance_id, index)
            for machine in self.machines.values()
            if not machine.is_gone
            and machine.instance_id in self.state.instances
            and self.state.instances[machine.instance_id].state is InstanceState.READY
            for index in range(machine.num_devices)
        ]
        assert not any(missing & self.weights_on(each) for each in reachable if each != device)
