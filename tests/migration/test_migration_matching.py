"""Placement against brute force, and reusable bytes against counting them one by one."""

import itertools

from hypothesis import assume, given
from hypothesis import strategies as st
from migration_scene import MODEL, fitting_shapes, has, size_of

from spotserve.core.cluster import DeviceId
from spotserve.core.cut import stage_cuts, units_held
from spotserve.core.messages import HeldSlot
from spotserve.core.plan import Parallel, ReplicaPlan, Slot
from spotserve.migration.matching import inheritable_kv_bytes, place, reusable_bytes


@given(st.lists(fitting_shapes, max_size=2), fitting_shapes)
def test_reusable_bytes_are_those_that_both_have(old, new) -> None:
    held = [HeldSlot(0, Slot("r-1", shape[2], shape[3]), Parallel(pipeline=shape[0], tensor=shape[1])) for shape in old]
    there = set().union(*(has(*shape) for shape in old))
    expected = size_of(there & has(*new))
    assert reusable_bytes(MODEL, held, Slot("r-2", new[2], new[3]), Parallel(pipeline=new[0], tensor=new[1])) == expected


@given(fitting_shapes, fitting_shapes, st.integers(0, 50))
def test_kv_counts_as_far_as_layers_and_heads_are_common(old, new, tokens: int) -> None:
    live = HeldSlot(0, Slot("r-1", old[2], old[3]), Parallel(pipeline=old[0], tensor=old[1]))

    def parts(shape) -> set[tuple[int, int]]:
        layers = stage_cuts(MODEL, shape[0])[shape[2]]
        return set(itertools.product(layers, units_held(MODEL.num_kv_heads, shape[1], shape[3])))

    expected = len(parts(old) & parts(new)) * tokens * MODEL.kv_bytes_per_token // (MODEL.num_layers * MODEL.num_kv_heads)
    parallel = Parallel(pipeline=new[0], tensor=new[1])
    assert inheritable_kv_bytes(MODEL, live, Slot("r-2", new[2], new[3]), parallel, tokens) == expected


def test_a_slot_finds_all_it_needs_where_it_is() -> None:
    parallel = Parallel(pipeline=2, tensor=2)
    for slot in ReplicaPlan(replica_id="r-1", parallel=parallel).slots:
        needed = size_of(has(2, 2, slot.stage, slot.shard))
        assert reusable_bytes(MODEL, [HeldSlot(0, slot, Parallel(pipeline=2, tensor=2))], slot, parallel) == needed


def alike(slot: Slot, device: DeviceId) -> int:
    return 2**40


def brute_force(weights: list[list[int]]) -> int:
    """Greatest sum over all ways to pair rows with columns."""
    if len(weights) > len(weights[0]):
        weights = [list(column) for column in zip(*weights, strict=True)]
    columns = range(len(weights[0]))
    return max(sum(weights[r][c] for r, c in enumerate(chosen)) for chosen in itertools.permutations(columns, len(weights)))


matrices = st.tuples(st.integers(1, 5), st.integers(1, 5), st.sampled_from([3, 1000, 2**40])).flatmap(
    lambda size: st.lists(st.lists(st.integers(0, size[2]), min_size=size[1], max_size=size[1]), min_size=size[0], max_size=size[0])
)


@given(matrices, st.randoms())
def test_placement_is_the_heaviest_whatever_the_order(weights: list[list[int]], random) -> None:
    slots = [Slot(f"r-{index}", 0, 0) for index in range(len(weights))]
    devices = [DeviceId(f"i-{index}", 0) for index in range(len(weights[0]))]

    def weight(slot: Slot, device: DeviceId) -> int:
        return weights[slots.index(slot)][devices.index(device)]

    placed = place(slots, devices, weight)
    assert len(placed.devices) == min(len(slots), len(devices))
    assert sum(weight(slot, device) for slot, device in placed.devices.items()) == brute_force(weights)
    random.shuffle(mixed := slots[:])
    random.shuffle(mixed_devices := devices[:])
    assert place(mixed, mixed_devices, weight) == placed


def test_nothing_to_place_or_nowhere() -> None:
    slot, device = Slot("r-1", 0, 0), DeviceId("i-1", 0)
    assert place([], [device], alike).devices == {}
    assert place([slot], [], alike).devices == {}


@given(
    st.integers(1, 3), st.sampled_from([1, 2, 4]), st.integers(1, 3), st.sets(st.integers(0, 11)), st.integers(0, 3), st.randoms()
)
def test_kept_replicas_keep_their_devices(pipeline: int, tensor: int, data: int, lost, spare: int, random) -> None:
    """A fleet of one shape loses devices and gains others: who still has all of theirs does not move."""
    parallel = Parallel(pipeline=pipeline, tensor=tensor)
    replicas = [ReplicaPlan(replica_id=f"r-{index}", parallel=parallel) for index in range(data)]
    slots = [slot for replica in replicas for slot in replica.slots]
    machines = [DeviceId(f"i-{index:02}", 0) for index in range(len(slots) + spare)]
    random.shuffle(machines)
    current = dict(zip(slots, machines, strict=False))
    there = [device for index, device in enumerate(sorted(machines)) if index not in lost]
    holds = {device: [HeldSlot(0, slot, Parallel(pipeline=pipeline, tensor=tensor))] for slot, device in current.items()}
    kept = [each for each in replicas if all(current[slot] in there for slot in each.slots)]
    fresh = [
        ReplicaPlan(replica_id=f"a-{index}", parallel=parallel) for index in range(len(there) // parallel.num_slots - len(kept))
    ]
    wanted = [slot for replica in [*fresh, *kept] for slot in replica.slots]
    assume(wanted)
    placed = place(
        wanted, there, lambda slot, device: reusable_bytes(MODEL, holds.get(device, []), slot, parallel), current=current
    )
    for replica in kept:
        assert all(placed.devices[slot] == current[slot] for slot in replica.slots)


def test_bytes_come_before_staying() -> None:
    stays, moves = Slot("r-1", 0, 0), Slot("r-2", 0, 0)
    old, new = DeviceId("i-1", 0), DeviceId("i-2", 0)
    weights = {(stays, old): 10, (stays, new): 10, (moves, old): 1, (moves, new): 0}
    placed = place([stays, moves], [old, new], lambda slot, device: weights[slot, device], current={stays: old, moves: new})
    assert placed.devices == {stays: new, moves: old}


def test_large_fleets_of_large_models_can_be_placed() -> None:
    slots = [Slot(f"r-{index:03}", 0, 0) for index in range(300)]
    devices = [DeviceId(f"i-{index:03}", 0) for index in range(300)]
    current = dict(zip(slots, reversed(devices), strict=True))
    assert place(slots, devices, alike, current=current).devices == current
