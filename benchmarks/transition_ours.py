"""Policy `spotserve` along a trace: the production controller's state decides, places and chooses what is sent.

At every transition a controller begins that knows nothing, and learns from machines what serves, as after a restart. Machines that
join register; those that leave have a notice. It is told the load, and that replicas are as fast as the profile says. All machines
that there are are held, or with `use_idle` off those that something runs on: the others are returned, and rented again when they
are wanted. Running sequences of replicas that end move with their KV to those that go on or have come, the freest first, as drains
have it; beyond their room they are computed again.
"""

from collections.abc import Iterator, Mapping

from transition_judge import Case, Decision, State, Transfer
from transition_traces import Transition

from spotserve.config import ControllerSettings
from spotserve.controller.proposals import EngineTerms
from spotserve.controller.rehearsal import Machine, Rehearsal, Standing, rehearse
from spotserve.core.cluster import DeviceId
from spotserve.core.plan import Placement, ReplicaPlan
from spotserve.migration.flows import Placed, kv_flows

PROFILED_BATCH = 8
"""The largest batch that profiles measured."""


class OurPolicy:
    """Decides as a running system does."""

    def __init__(self, case: Case, *, max_batch: int = PROFILED_BATCH, use_idle: bool = True) -> None:
        self._case = case
        self._use_idle = use_idle
        self._engine = EngineTerms(max_batch, speed_of=case.speed_of)
        workload = case.workload
        load = {"rate_rps": workload.rate_rps, "gap_cv": workload.gap_cv}
        lengths = {"prompt_tokens": round(workload.prompt.mean), "output_tokens": round(workload.output.mean)}
        self._settings = ControllerSettings.model_validate({"planning": "auto", "use_idle": use_idle, **load, **lengths})

    def decide(self, transition: Transition, state: State, running: Mapping[str, int]) -> Decision:
        """See `transition_judge.Policy`."""
        case = self._case
        kind, price = case.machines.kind, case.machines.usd_per_hour
        known = sorted(transition.before | transition.after)
        rehearsal = rehearse(
            case.model,
            [Machine(instance_id, kind, price) for instance_id in known],
            self._settings,
            engine=self._engine,
            standing=[
                Standing(each, {slot: state.placement.devices[slot] for slot in each.slots}) for each in _numbered(state).replicas
            ],
            lose=sorted(transition.before - transition.after),
            grace_s=case.machines.grace_s,
        )
        after = _state_after(rehearsal)
        ended = [each for each in state.replicas if each not in after.replicas]
        transfers = [*_weights(rehearsal), *self._kv(state, after, running, ended)]
        shapes = [f"({each.parallel.pipeline},{each.parallel.tensor})" for each in after.replicas]
        label = " + ".join(f"{shapes.count(shape)}x{shape}" for shape in sorted(set(shapes))) or "nothing"
        used = frozenset(device.instance_id for device in after.placement.devices.values())
        return Decision(after, tuple(transfers), transition.after if self._use_idle else used, len(ended), label)

    def _kv(self, before: State, after: State, running: Mapping[str, int], ended: list[ReplicaPlan]) -> Iterator[Transfer]:
        """KV of sequences whose replica ends, one by one to the freest replica."""
        kept = {each.replica_id: running.get(each.replica_id, 0) for each in after.replicas}
        room = {each.replica_id: each.parallel.max_batch - kept[each.replica_id] for each in after.replicas}
        for replica in ended:
            for number in range(running.get(replica.replica_id, 0)):
                heir = max(after.replicas, key=lambda each: room[each.replica_id], default=None)
                if heir is None or room[heir.replica_id] <= 0:
                    return
                room[heir.replica_id] -= 1
                old = Placed(replica, {slot: before.placement.devices[slot] for slot in replica.slots})
                new = Placed(heir, {slot: after.placement.devices[slot] for slot in heir.slots})
                for flow in kv_flows(self._case.model, [(f"{number}", self._case.filled_tokens)], old, new):
                    yield Transfer(flow.source, flow.destination, flow.num_bytes)


def _numbered(state: State) -> State:
    """Replicas have the names that our planner gives; another policy's are named anew."""
    assert all(each.replica_id.startswith("r-") for each in state.replicas), "starts from its own states only"
    return state


def _state_after(rehearsal: Rehearsal) -> State:
    """What should run, and where: a rehearsal's machines have done all that they were told."""
    found = rehearsal.state
    planned = found.plan.replicas if found.plan is not None else ()
    replicas = tuple(each for each in planned if each.replica_id in found.replicas)
    devices = {slot: device for each in replicas for slot, device in found.replicas[each.replica_id].devices.items()}
    return State(replicas, Placement(devices=devices))


def _weights(rehearsal: Rehearsal) -> Iterator[Transfer]:
    """What was sent for replicas that came to be; what was given up in the same turn was never begun."""
    for activate in (*rehearsal.earlier, *rehearsal.activations):
        if activate.replica.replica_id in rehearsal.state.replicas:
            for transfer in activate.transfers:
                yield Transfer(transfer.source, DeviceId(activate.instance_id, activate.device_index), transfer.num_bytes)
