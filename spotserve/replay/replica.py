"""One replica of a simulation: its batch, and how it is emptied when it is told to drain.

A drain goes as in `worker.drain`: what is to be computed again elsewhere is let go at once, KV moves one call after the other, each
running until its turn comes, and what was to finish and has not shortly before the deadline goes as well.

Owner of its calls. Knows other replicas only as places for KV.
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf

from spotserve.core.cluster import DeviceId
from spotserve.core.messages import Drain, SequenceAction, SequenceOrder, SequenceReport
from spotserve.core.model import ModelSpec
from spotserve.core.plan import ReplicaPlan, Slot
from spotserve.migration.flows import Placed, kv_flows
from spotserve.replay.agenda import Agenda, Appointment
from spotserve.replay.batching import Batch
from spotserve.replay.call import Call
from spotserve.replay.ports import Ports

LEAVE_BEFORE_DEADLINE_S = 0.25
"""As `worker.drain` has it."""


@dataclass(frozen=True, slots=True)
class Doings:
    """What a replica tells the simulation."""

    ended: Callable[[Call], None]
    """Its client has all tokens."""
    let_go: Callable[[Call, str | None], None]
    """It is to go on elsewhere from its tokens, where if anybody says so."""
    arrived: Callable[[Call, "SimulatedReplica", "SimulatedReplica", int, float], bool]
    """The KV of a call has come from one replica to another: so many bytes, in so many seconds. False: it is not taken."""
    emptied: Callable[["SimulatedReplica"], None]
    """Nothing runs on it any more, as it was told."""


@dataclass(slots=True, eq=False)
class SimulatedReplica:
    """A replica that serves, or did until it was told to drain."""

    plan: ReplicaPlan
    devices: Mapping[Slot, DeviceId]
    batch: Batch
    agenda: Agenda
    doings: Doings
    is_dead: bool = False
    """One of its machines is gone; nobody may have noticed yet."""
    stranded: list[Call] = field(default_factory=list)
    """Calls of a dead replica."""
    draining: Drain | None = None
    _moves: deque[tuple[Call, SequenceOrder]] = field(default_factory=deque)
    _moving: tuple[Call, Appointment] | None = None
    _leave: Appointment | None = None
    _wake: Appointment | None = None

    @property
    def replica_id(self) -> str:
        """Its name in plans."""
        return self.plan.replica_id

    @property
    def leader_id(self) -> str:
        """The instance that takes its calls."""
        return self.devices[Slot(self.replica_id, 0, 0)].instance_id

    # ------------------------------------------------------------------ calls

    def take(self, call: Call) -> None:
        """The router has sent a call."""
        if self.is_dead:
            self.stranded.append(call)
            return
        self._advance()
        self.batch.add(call, self.agenda.now_s)
        self._reset()

    def adopt(self, call: Call) -> bool:
        """A call comes with its KV; False: there is no room."""
        if self.is_dead or self.draining is not None:
            return False
        self._advance()
        is_taken = self.batch.adopt(call, self.agenda.now_s)
        self._reset()
        return is_taken

    def reports(self) -> tuple[SequenceReport, ...]:
        """What runs, as a heartbeat tells it."""
        self.batch.sync(self.agenda.now_s)
        found = []
        for call in self.batch.calls():
            emitted = self.batch.emitted(call)
            context = call.prompt_tokens + emitted
            computed = context - 1 if call.begun >= 0 else 0
            found.append(SequenceReport(str(call.index), context, computed, call.output_tokens - emitted))
        return tuple(found)

    def _advance(self) -> None:
        for call in self.batch.advance(self.agenda.now_s):
            self.doings.ended(call)

    def _reset(self) -> None:
        """Plans to be there when something happens in the batch by itself."""
        due_s = self.batch.next_s
        if self._wake is not None:
            if self._wake.time_s == due_s and self._wake.act is not None:
                return
            self._wake.call_off()
        self._wake = None if due_s == inf else self.agenda.at(due_s, self._woken)

    def _woken(self) -> None:
        self._wake = None
        self._advance()
        self._reset()
        if self.draining is not None:
            self._tell_if_empty()

    # ------------------------------------------------------------------ going

    def die(self) -> None:
        """One of its machines is gone, and with it what is on its way from there."""
        if self.is_dead:
            return
        self._advance()
        self.is_dead = True
        self._stop_draining()
        self.stranded += self.batch.take_all(self.agenda.now_s)
        self._reset()

    def leave(self) -> list[Call]:
        """It serves no more; the calls that it still has."""
        if not self.is_dead:
            self.die()
        stranded, self.stranded = self.stranded, []
        return stranded

    def drain(self, command: Drain, places: Mapping[str, "SimulatedReplica"], model: ModelSpec, ports: Ports) -> None:
        """Empties itself as the command says."""
        if self.is_dead:
            return
        self._advance()
        self._stop_draining()
        self.draining = command
        orders = {order.request_id: order for order in command.orders}
        calls = {str(call.index): call for call in self.batch.calls()}
        listed = [(calls[each], order) for each, order in orders.items() if each in calls]
        listed += [(call, command.fallback) for each, call in calls.items() if each not in orders]
        for call, order in listed:
            if order.action is SequenceAction.RESUME:
                self._let_go(call, order.destination_replica_id)
        self._moves.extend(each for each in listed if each[1].action in (SequenceAction.MOVE, SequenceAction.SPLIT))
        self._leave = self.agenda.at(
            command.deadline_s - LEAVE_BEFORE_DEADLINE_S, lambda: self._leave_late(command, places, model, ports)
        )
        self._next_move(places, model, ports)
        self._reset()

    def undrain(self) -> None:
        """It takes calls again."""
        self._stop_draining()

    def _stop_draining(self) -> None:
        self.draining = None
        self._moves.clear()
        if self._leave is not None:
            self._leave.call_off()
            self._leave = None
        if self._moving is not None:
            call, appointment = self._moving
            appointment.call_off()
            self._moving = None
            self.stranded.append(call) if self.is_dead else self.doings.let_go(call, None)

    def _let_go(self, call: Call, prefer: str | None) -> None:
        self.batch.take(call, self.agenda.now_s)
        self.doings.let_go(call, prefer)

    def _next_move(self, places: Mapping[str, "SimulatedReplica"], model: ModelSpec, ports: Ports) -> None:
        """The next call's KV is sent, once everything before it has been."""
        self._moving = None
        self._advance()
        present = set(self.batch.calls())
        while self._moves:
            call, order = self._moves.popleft()
            if call not in present:
                continue
            place = places.get(order.destination_replica_id or "")
            if call.begun < 0 or place is None or place.is_dead or place is self:
                self._let_go(call, order.destination_replica_id)
                continue
            now_s = self.agenda.now_s
            self.batch.take(call, now_s)
            flows = kv_flows(
                model,
                [(str(call.index), call.context_tokens - 1)],
                Placed(self.plan, self.devices),
                Placed(place.plan, place.devices),
            )
            ends_s = [ports.send(flow.source, flow.destination, flow.num_bytes, now_s) for flow in flows]
            end_s, num_bytes = max(ends_s, default=now_s), sum(flow.num_bytes for flow in flows)

            def arrive(
                call: Call = call, place: SimulatedReplica = place, num_bytes: int = num_bytes, began_s: float = now_s
            ) -> None:
                if not self.doings.arrived(call, self, place, num_bytes, self.agenda.now_s - began_s):
                    self.doings.let_go(call, None)
                self._next_move(places, model, ports)

            self._moving = (call, self.agenda.at(end_s, arrive))
            break
        self._reset()
        self._tell_if_empty()

    def _leave_late(self, command: Drain, places: Mapping[str, "SimulatedReplica"], model: ModelSpec, ports: Ports) -> None:
        """The deadline is near."""
        self._advance()
        pending = {call for call, _ in self._moves}
        fallback = command.fallback
        for call in [call for call in self.batch.calls() if call not in pending]:
            if fallback.destination is None or self.agenda.now_s >= command.deadline_s:
                self._let_go(call, fallback.destination_replica_id)
            else:
                self._moves.append((call, fallback))
        if self._moving is None:
            self._next_move(places, model, ports)
        self._reset()

    def _tell_if_empty(self) -> None:
        if self.draining is not None and len(self.batch) == 0 and self._moving is None:
            self.doings.emptied(self)
