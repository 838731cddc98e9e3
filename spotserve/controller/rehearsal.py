"""What would happen to a fleet that need not exist: the production state among machines that do at once what they are told.

Machines register, some with replicas that serve already; then some are lost, with a notice or without. What the state commands is
what a running system would command. There is no second planner, and nothing that runs is touched.

Pure: the clock stands still but for the losses. Does not know how fast anything is carried out; `phases` tells that of the
transfers it collects.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from spotserve.config import ControllerSettings
from spotserve.controller.bringup import Arrangement
from spotserve.controller.phases import Phase, phase_of
from spotserve.controller.proposals import EngineTerms
from spotserve.controller.state import ControllerState
from spotserve.core.cluster import DeviceId, Notice
from spotserve.core.hardware import InstanceType
from spotserve.core.messages import (
    Activate,
    Address,
    Command,
    Drain,
    Drained,
    Event,
    HeldSlot,
    InstanceLaunched,
    InstanceLost,
    NoticeReceived,
    Registered,
    SlotReady,
)
from spotserve.core.model import ModelSpec
from spotserve.core.plan import ReplicaPlan, Slot
from spotserve.migration.flows import InstanceLinks

START_S = 1.0
LOSS_S = 10.0
_HOST = "rehearsal"
_MOST_TURNS = 100_000


@dataclass(frozen=True, slots=True)
class Machine:
    """One machine of the fleet."""

    instance_id: str
    hardware: InstanceType
    usd_per_hour: float
    spot: bool = True
    zone: str = "zone"


@dataclass(frozen=True, slots=True)
class Standing:
    """A replica that serves when the rehearsal begins."""

    replica: ReplicaPlan
    devices: Mapping[Slot, DeviceId]


@dataclass(slots=True)
class Rehearsal:
    """How a rehearsal went."""

    state: ControllerState
    before: dict[str, Standing] = field(default_factory=dict)
    """Replicas that served when the last change began."""
    activations: list[Activate] = field(default_factory=list)
    """What the last change has devices bring up."""
    earlier: list[Activate] = field(default_factory=list)
    """What changes before that had them bring up."""
    phases: list[Phase] = field(default_factory=list)
    """What the last change moves, turn by turn, each from the end of the one before."""
    began_s: float = START_S
    """When the last change began, on the rehearsal's clock."""
    arranged: list[Arrangement] = field(default_factory=list)
    """In the turn that is being played."""


def rehearse(
    model: ModelSpec,
    machines: Sequence[Machine],
    settings: ControllerSettings,
    *,
    engine: EngineTerms,
    standing: Sequence[Standing] = (),
    lose: Sequence[str] = (),
    grace_s: float = 0.0,
) -> Rehearsal:
    """Lets machines register and settle, then takes `lose` away, all with one notice of `grace_s` seconds (0: without any)."""
    state = ControllerState(settings.model_copy(update={"instances": None}), engine)  # the machines are those that are given
    rehearsal = Rehearsal(state, {each.replica.replica_id: each for each in standing})
    launched = [
        InstanceLaunched(instance_id=each.instance_id, spot=each.spot, zone=each.zone, usd_per_hour=each.usd_per_hour)
        for each in machines
    ]
    cast = _Cast(rehearsal, model, {each.instance_id: _links(each.hardware) for each in machines})
    cast.play(launched, now_s=0.0)
    cast.play((_registered(number, each, model, standing) for number, each in enumerate(machines)), now_s=START_S)
    if lose:
        rehearsal.before = {
            replica_id: Standing(replica.plan, dict(replica.devices)) for replica_id, replica in state.replicas.items()
        }
        rehearsal.earlier, rehearsal.activations, rehearsal.phases = rehearsal.activations, [], []
        rehearsal.began_s = LOSS_S
        events: list[Event] = [InstanceLost(instance_id=each, reason="rehearsal") for each in lose]
        cast.deadlines_s = dict.fromkeys(lose, LOSS_S + grace_s)
        if grace_s > 0:
            notices = (Notice(instance_id=each, deadline_s=LOSS_S + grace_s, source="rehearsal") for each in lose)
            events = [*(NoticeReceived(notice=notice) for notice in notices), *events]
        cast.play(events, now_s=LOSS_S)
    return rehearsal


def _links(hardware: InstanceType) -> InstanceLinks:
    return InstanceLinks(hardware.network, hardware.device_link)


@dataclass(slots=True)
class _Cast:
    """The state of a rehearsal and the machines that answer it."""

    rehearsal: Rehearsal
    model: ModelSpec
    links: Mapping[str, InstanceLinks]
    deadlines_s: Mapping[str, float] = field(default_factory=dict)

    def play(self, events: Iterable[Event], *, now_s: float) -> None:
        """Tells the state what happens; when all of it has happened, machines answer what was commanded, and so on."""
        answers = self._turn(events, now_s)
        for _ in range(_MOST_TURNS):
            if not answers:
                return
            answers = self._turn(answers, now_s)
        raise AssertionError("the state never comes to rest")

    def _turn(self, events: Iterable[Event], now_s: float) -> list[Event]:
        answers = [answer for event in events for answer in self._tell(event, now_s)]
        if arranged := self.rehearsal.arranged:
            phases, replicas = self.rehearsal.phases, self.rehearsal.state.replicas
            start_s = max((each.start_s + each.schedule.makespan_s for each in phases), default=self.rehearsal.began_s)
            shapes = {replica_id: replica.plan.parallel for replica_id, replica in replicas.items()}
            phases.append(
                phase_of(
                    self.model,
                    arranged,
                    shapes,
                    links=self.links,
                    made_s=now_s,
                    start_s=start_s,
                    deadlines_s=self.deadlines_s,
                )
            )
            self.rehearsal.arranged = []
        return answers

    def _tell(self, event: Event, now_s: float) -> list[Event]:
        state, before = self.rehearsal.state, self.rehearsal.state.arrangement
        commands = state.handle(event, now_s)
        if state.arrangement is not None and state.arrangement is not before:
            self.rehearsal.arranged.append(state.arrangement)
        return [answer for command in commands for answer in self._obey(command)]

    def _obey(self, command: Command) -> list[Event]:
        if isinstance(command, Activate):
            self.rehearsal.activations.append(command)
        answer = answer_at_once(command, self.model)
        return [] if answer is None else [answer]


def answer_at_once(command: Command, model: ModelSpec) -> SlotReady | Drained | None:
    """What a machine says that does in no time what it is told, reads all that it needs, and never fails; None: nothing."""
    match command:
        case Activate():
            return SlotReady(
                instance_id=command.instance_id,
                device_index=command.device_index,
                slot=command.slot,
                plan_epoch=command.plan_epoch,
                model=model,
                pulled_bytes=sum(transfer.num_bytes for transfer in command.transfers),
                invariant="batch",
            )
        case Drain():
            return Drained(instance_id=command.instance_id, replica_id=command.replica_id)
        case _:
            return None


def _registered(number: int, machine: Machine, model: ModelSpec, standing: Sequence[Standing]) -> Registered:
    mine = [
        (each.replica, HeldSlot(device.index, slot, each.replica.parallel))
        for each in standing
        for slot, device in each.devices.items()
        if device.instance_id == machine.instance_id
    ]
    return Registered(
        instance_id=machine.instance_id,
        address=Address(_HOST, number + 1),
        pid=number + 1,
        ranks=tuple(Address(_HOST, 1 + number * 1000 + index) for index in range(machine.hardware.num_devices)),
        spot=machine.spot,
        zone=machine.zone,
        replicas=tuple(replica for replica, _ in mine),
        held=tuple(held for _, held in mine),
        model=model,
        hardware=machine.hardware,
    )
