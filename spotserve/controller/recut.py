"""From what runs to what should run: what is kept, what is brought up beside it, and the turn in which the new takes over.

Replicas that the plan does not name any more go on serving until every replica that it does name is ready; then, in one turn,
these serve and those drain. A plan that cannot be carried out yet is postponed, and tried again with every event.
"""

from collections import Counter
from collections.abc import Sequence

from spotserve.controller.adoption import incomplete
from spotserve.controller.bringup import Arrangement, arrange, bring_up
from spotserve.controller.changes import Changes
from spotserve.controller.choosing import Chooser
from spotserve.controller.fleet import Fleet
from spotserve.controller.leaving import leave_replaced
from spotserve.controller.records import Replica
from spotserve.core.cluster import DeviceId, InstanceState, ReplicaState
from spotserve.core.messages import Command
from spotserve.core.plan import Parallel, Plan
from spotserve.planner.planner import Shape, listed, number_after, plan

PATIENCE_S = 10.0
"""How long a machine that has been launched may take to register before one makes do with a smaller shape."""


TOGETHER_S = 0.5
"""Machines of one fleet are launched one after another: so long after the latest one the next may still follow."""


class Recut:
    """Owner of the plan and of what the user wants."""

    def __init__(self, fleet: Fleet, wanted: Shape | None, chooser: Chooser, *, max_batch: int) -> None:
        """`wanted` None: `chooser` says what should run."""
        self._fleet = fleet
        self._chooser = chooser
        self._max_batch = max_batch
        self._next_replica_number = 1
        self._postponed: str | None = None
        self.retry_s: float | None = None
        """When a postponed plan is to be tried again though nothing has happened; None: never."""
        self._proven: Shape | None = None
        """The shape that was wanted when a replica of that shape last began to serve."""
        self.wanted = wanted
        self.plan: Plan | None = None
        self.arrangement: Arrangement | None = None
        """Of the last plan that had something to bring up."""
        self.changes = Changes(fleet)

    def use_numbers_after(self, replica_ids: set[str]) -> None:
        """An identity that has been used is never used again."""
        self._next_replica_number = number_after(replica_ids, self._next_replica_number)

    # ------------------------------------------------------------------ planning

    def retry(self, now_s: float) -> tuple[list[Command], str]:
        """Tries a postponed plan again; nothing when there is none, or when it still cannot be carried out."""
        if self._postponed is None:
            return [], ""
        commands, reason = self.replan(self._postponed, now_s)
        return (commands, reason) if self._postponed is None else ([], "")

    def replan(self, cause: str, now_s: float) -> tuple[list[Command], str]:
        """Plans for the devices that are there to stay, and brings up what is missing."""
        self.retry_s = None
        if (waits := self._first_waits(now_s)) is not None:
            self._postponed = cause
            return [], f"{cause}; {waits}"
        devices = self._fleet.ready_devices()
        staying = self._staying()
        target = self._target(devices, staying, now_s)
        if isinstance(target, str):
            self._postponed = cause
            return [], f"{cause}; {target}"
        named = {replica.replica_id for replica in target.replicas}
        abandoned = [
            each
            for each in self._fleet.in_state(ReplicaState.LOADING)
            if each.replica_id not in named and each.complete_by_s is None
        ]
        kept = {device for replica in staying if replica.replica_id in named for device in replica.devices.values()}
        going = {replica.replica_id for replica in abandoned}
        taken = Counter(
            device
            for replica in self._fleet.replicas.values()
            if replica.replica_id not in going
            for device in set(replica.devices.values())
        )
        free = [device for device in devices if device not in kept and taken[device] <= 1]
        missing = [replica for replica in target.replicas if replica.replica_id not in self._fleet.replicas]
        obstacle = self._obstacle(target, len(free), now_s)
        if obstacle is not None:
            self._postponed = cause
            return [], f"{cause}; {obstacle}"
        self._postponed = self.retry_s = None
        self.use_numbers_after({replica.replica_id for replica in target.replicas})
        commands: list[Command] = [command for replica in abandoned for command in self._fleet.drop(replica)]
        outgoing = [
            replica.replica_id
            for replica in self._fleet.replicas.values()
            if replica.replica_id not in named
            and (replica.state is ReplicaState.SERVING or (replica.leaving is not None and not replica.leaving.is_told))
        ]
        arrangement = arrange(self._fleet, missing, free, now_s=now_s)
        activations = bring_up(self._fleet, missing, arrangement, target.epoch, now_s)
        if missing:
            self.arrangement = arrangement
        if target is not self.plan and (missing or outgoing):
            self.changes.begin(
                epoch=target.epoch,
                reason=cause,
                incoming=[replica.replica_id for replica in missing],
                outgoing=outgoing,
                planned_bytes=arrangement.num_bytes,
                now_s=now_s,
            )
        self.plan = target
        return [*commands, *activations], f"{cause}; {target.reason}"

    def _target(self, devices: Sequence[DeviceId], staying: Sequence[Replica], now_s: float) -> Plan | str:
        """What should run; or why nothing can be planned yet."""
        if self.wanted is None:
            return self._chooser.choose(staying, self.plan, next_replica_number=self._next_replica_number, now_s=now_s)
        return plan(
            len(devices),
            self.plan,
            wanted=self.wanted,
            model=self._fleet.model,
            max_batch=self._max_batch,
            surviving=[replica.plan for replica in staying],
            next_replica_number=self._next_replica_number,
        )

    def _staying(self) -> list[Replica]:
        """Replicas that may be kept, those that serve first, oldest first. Of two that share a device one may. Where all are to be
        of one shape, two of that shape share one when a machine stays against its notice. Where the planner chooses, two of any
        shape do while one takes the other's place, and the one that the plan names goes before."""
        staying: list[Replica] = []
        claimed: dict[Parallel | None, set[DeviceId]] = {}
        present = [*self._fleet.in_state(ReplicaState.SERVING), *self._fleet.in_state(ReplicaState.LOADING)]
        if self.wanted is None and self.plan is not None:
            named = {replica.replica_id for replica in self.plan.replicas}
            present.sort(key=lambda replica: replica.replica_id not in named)
        for replica in present:
            taken = claimed.setdefault(None if self.wanted is None else replica.plan.parallel, set())
            if replica.complete_by_s is None and self._fleet.is_undisturbed(replica) and taken.isdisjoint(replica.devices.values()):
                taken.update(replica.devices.values())
                staying.append(replica)
        return staying

    def _first_waits(self, now_s: float) -> str | None:
        """Why the planner's first plan has to wait: for a fleet that is still coming nothing is searched, since a search for every
        machine that registers takes a thousand times as long as one for all of them."""
        if self.wanted is not None or self.plan is not None or all(each.address is not None for each in self._fleet.alive()):
            return None
        return self._waits_for_machines(now_s)

    def _obstacle(self, target: Plan, num_free: int, now_s: float) -> str | None:
        """Why a plan has to wait; None when it can be carried out."""
        if parts := incomplete(self._fleet):
            return f"waiting for the rest of {', '.join(each.replica_id for each in parts)}"
        num_missing = sum(each.parallel.num_slots for each in target.replicas if each.replica_id not in self._fleet.replicas)
        if num_missing > num_free:
            return "waiting for the devices of replicas that drain"
        if self.wanted is None or num_missing == 0:
            return None
        wanted = (self.wanted.pipeline, self.wanted.tensor)
        is_makeshift = any((each.parallel.pipeline, each.parallel.tensor) != wanted for each in target.replicas)
        return self._waits_for_machines(now_s) if is_makeshift else None

    def _waits_for_machines(self, now_s: float) -> str | None:
        """Whether machines may still come before one makes do with those that are there."""
        alive = self._fleet.alive()
        if any(each.state is InstanceState.DRAINING for each in alive):
            return None
        until_s = [each.launched_s + (PATIENCE_S if each.address is None else TOGETHER_S) for each in alive]
        self.retry_s = min((each for each in until_s if now_s < each), default=None)
        return "waiting for machines that are coming rather than making do with less" if self.retry_s is not None else None

    # ------------------------------------------------------------------ switching

    def settle(self, now_s: float) -> str:
        """Lets what is ready serve, and what has been replaced drain; what happened, in a sentence."""
        named = {replica.replica_id for replica in self.plan.replicas} if self.plan is not None else set()
        loading = [each for each in self._fleet.in_state(ReplicaState.LOADING) if each.replica_id in named]
        replaced = [each for each in self._fleet.in_state(ReplicaState.SERVING) if each.replica_id not in named]
        ready = [replica for replica in loading if replica.is_complete]
        if replaced:
            is_whole = named <= self._fleet.replicas.keys() and len(ready) == len(loading)
            if not is_whole or self._postponed is not None:
                return ""
        for replica in ready:
            replica.move_to(ReplicaState.SERVING)
            replica.serving_since_s = now_s
            parallel, wanted = replica.plan.parallel, self.wanted
            if wanted is not None and (parallel.pipeline, parallel.tensor) == (wanted.pipeline, wanted.tensor):
                self._proven = wanted
        for replica in replaced:
            replica.move_to(ReplicaState.DRAINING)
            replica.leaving = leave_replaced(now_s)
        told = f"{_names(ready)} serve{'' if len(ready) > 1 else 's'}" if ready else ""
        return f"{told or 'nothing new'} in place of {_names(replaced)}" if replaced else told

    def note_ends(self, now_s: float) -> None:
        """Closes the records of changes that are over."""
        self.changes.settle({replica.replica_id for replica in self.plan.replicas} if self.plan is not None else (), now_s)

    def give_up_shape(self, failed: Parallel, reason: str) -> str | None:
        """A shape cannot be brought up: back to the wanted one that serves, or to another that the planner chooses. What was done;
        None when there is none."""
        if self.wanted is None:
            self._chooser.refuse(failed, reason)
            return "the planner chooses among other shapes"
        serving = self._fleet.in_state(ReplicaState.SERVING)
        if self._proven is None or self._proven == self.wanted or not serving:
            return None
        self.wanted = self._proven
        return "back to the shape that serves"


def _names(replicas: Sequence[Replica]) -> str:
    return listed([replica.replica_id for replica in replicas])
