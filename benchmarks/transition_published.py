"""Policy `spotserve-2024` along a trace: the published rule decides, the published mapper places, the published mover sends.

As the artifact runs it: all machines that there are are held, those that the rule leaves over are idle. What is announced is acted
on `grace_s` ahead. T_mig is estimated beforehand from a dry run in which every replica has a full batch; what is really sent is
of the batches that there are. When fewer machines are left than a replica needs, the artifact ends; here nothing runs until there
are enough again, and what starts then reads its weights from files, as at the beginning.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from transition_judge import Case, Decision, State, Transfer
from transition_traces import Transition

from spotserve.core.cluster import DeviceId
from spotserve.core.plan import Parallel, Placement, ReplicaPlan, Slot
from spotserve.migration.spotserve_2024 import Batch, Grid, Layout, Position, first_layout, grows, inherit, remap
from spotserve.migration.spotserve_2024_moves import SWITCH_S, Measure, Move, Traffic, estimate_s, moves, traffic
from spotserve.planner.spotserve_2024 import choose

MAX_BATCH = 4
"""What the artifact's scripts allow, and what is run whatever B the rule has chosen."""
ESTIMATE, SENT, SENT_PORT = "T_mig estimated, s", "GB sent with padding", "port time of these, s"


class PublishedPolicy:
    """Decides as the artifact does; keeps nothing between decisions."""

    def __init__(self, case: Case) -> None:
        self._case = case

    def decide(self, transition: Transition, state: State, running: Mapping[str, int]) -> Decision:
        """See `transition_judge.Policy`. `state` must be one of its own: a grid of replicas that are alike."""
        case = self._case
        devices = case.machines.on(transition.after)
        choice = choose(
            case.profile,
            num_instances=len(transition.after),
            devices_per_instance=case.machines.kind.num_devices,
            required_rps=case.required_rps,
            min_devices=case.min_devices,
            max_batch=MAX_BATCH,
            output_tokens=round(case.workload.output.mean),
        )
        if choice is None:
            return Decision(State(), (), transition.after, len(state.replicas), "nothing")
        grid = Grid(choice.data, choice.pipeline, choice.tensor)
        label = f"({grid.data},{grid.pipeline},{grid.tensor})"
        if not state.replicas:
            return Decision(_state_of(first_layout(devices, grid)), (), transition.after, 0, label)
        old = _layout_of(state)
        batches = [self._batch(running[replica.replica_id]) for replica in state.replicas]
        inherits = inherit(batches, grid.data)
        new = remap(case.published, old, devices, grid, batches=batches, inherits=inherits)
        found = moves(case.published, old, new, batches=batches, inherits=inherits)
        return Decision(
            _state_of(new),
            tuple(Transfer(*pair, size) for pair, size in traffic(case.published, found, Measure.PLAIN).items()),
            transition.after,
            0 if grows(old, devices, grid) else len(state.replicas),
            label,
            self._own_figures(old, devices, new, found),
        )

    def _batch(self, sequences: int) -> Batch | None:
        return Batch(sequences, self._case.model.context_tokens, self._case.filled_tokens) if sequences else None

    def _own_figures(self, old: Layout, devices: Sequence[DeviceId], new: Layout, found: Sequence[Move]) -> dict[str, float]:
        """What the artifact believes, and what it sends with everything that the model does not need."""
        if old == new:
            return {ESTIMATE: 0.0, SENT: 0.0, SENT_PORT: 0.0}
        shape = self._case.published
        full = [self._batch(MAX_BATCH)] * old.grid.data
        first = range(new.grid.data)
        dry = remap(shape, old, devices, new.grid, batches=full, inherits=first)
        counted = traffic(shape, moves(shape, old, dry, batches=full, inherits=first), Measure.COUNTED)
        sent = traffic(shape, found, Measure.SENT)
        port_s = _busiest_bytes(sent) / self._case.machines.kind.network.bytes_per_s
        return {ESTIMATE: estimate_s(counted) + SWITCH_S, SENT: sum(sent.values()) / 1e9, SENT_PORT: port_s}


def _busiest_bytes(sizes: Traffic) -> float:
    """Bytes of the busiest direction of a machine's port."""
    ports: defaultdict[tuple[str, str], float] = defaultdict(float)
    for (source, destination), size in sizes.items():
        if source.instance_id != destination.instance_id:
            ports[source.instance_id, "out"] += size
            ports[destination.instance_id, "in"] += size
    return max(ports.values(), default=0.0)


def _state_of(layout: Layout) -> State:
    """Layers are cut evenly, without the empty ones: as fast as the published formula has it."""
    parallel = Parallel(pipeline=layout.grid.pipeline, tensor=layout.grid.tensor, max_batch=MAX_BATCH)
    replicas = tuple(ReplicaPlan(replica_id=f"p-{number}", parallel=parallel) for number in range(layout.grid.data))
    devices = {Slot(f"p-{place.replica}", place.stage, place.shard): device for device, place in layout.positions.items()}
    return State(replicas, Placement(devices=devices))


def _layout_of(state: State) -> Layout:
    parallel = state.replicas[0].parallel
    assert all(replica.parallel == parallel for replica in state.replicas), "the published policy knows replicas that are alike"
    numbers = {replica.replica_id: number for number, replica in enumerate(state.replicas)}
    positions = {
        device: Position(numbers[slot.replica_id], slot.stage, slot.shard) for slot, device in state.placement.devices.items()
    }
    return Layout(Grid(len(state.replicas), parallel.pipeline, parallel.tensor), positions)
