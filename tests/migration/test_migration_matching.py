"""Placement against brute force, and reusable bytes against counting them one by one."""

import itertools

from hypothesis import assume, given
from hypothesis import strategies as st

from spotserve.core.cluster import DeviceId
from spotserve.core.messages import HeldSlot
from spotserve.core.model import ModelSpec
from spotserve.core.plan import Parallel, ReplicaPlan, Slot
from spotserve.migration.matching import place, reusable_bytes
from spotserve.migration.slices import shard_bytes, stage_layers


def model(num_layers: int, layer_bytes: int, embedding_bytes: int = 11, head_bytes: int = 7) -> ModelSpec:
    return ModelSpec(
        name="m",
        num_layers=num_layers,
        num_kv_heads=1,
        head_size=1,
        vocabulary_size=1,
        context_tokens=1,
        layer_bytes=layer_bytes,
        embedding_bytes=embedding_bytes,
        head_bytes=head_bytes,
        value_bytes=4,
    )


def owner(size: int, parts: int, index: int) -> int:
    """The part that has the `index`-th of `size` things, found by asking each part."""
    (found,) = [part for part in range(parts) if part * size // parts <= index < (part + 1) * size // parts]
    return found


def has(spec: ModelSpec, pipeline: int, tensor: int, stage: int, shard: int) -> set[tuple[str, int, int]]:
    """Every byte of a slot, as (kind, layer, position)."""
    sizes = [spec.num_layers // pipeline + (index < spec.num_layers % pipeline) for index in range(pipeline)]
    first = sum(sizes[:stage])
    layers = [("layer", layer, spec.layer_bytes) for layer in range(first, first + sizes[stage])]
    layers += [("embedding", 0, spec.embedding_bytes)] if stage == 0 else []
    layers += [("head", 0, spec.head_bytes)] if stage == pipeline - 1 else []
    return {(kind, layer, index) for kind, layer, size in layers for index in range(size) if owner(size, tensor, index) == shard}


shapes = st.tuples(st.integers(1, 4), st.integers(1, 4)).flatmap(
    lambda shape: st.tuples(st.just(shape[0]), st.just(shape[1]), st.integers(0, shape[0] - 1), st.integers(0, shape[1] - 1))
)


@given(shapes, shapes, st.integers(1, 7), st.integers(1, 13))
def test_reusable_bytes_are_those_that_both_have(old, new, num_layers: int, layer_bytes: int) -> None:
    spec = model(num_layers, layer_bytes)
    held = HeldSlot(0, Slot("r-1", old[2], old[3]), old[0], old[1])
    parallel = Parallel(pipeline=new[0], tensor=new[1])
    expected = len(has(spec, *old) & has(spec, *new))
    assert reusable_bytes(spec, held, Slot("r-2", new[2], new[3]), parallel) == expected


@given(shapes, shapes, st.integers(1, 7), st.integers(0, 5))
def test_kv_counts_for_the_same_replica_and_in_proportion(old, new, num_layers: int, kv_per_part: int) -> None:
    spec = model(num_layers, 12)
    held = HeldSlot(0, Slot("r-1", old[2], old[3]), old[0], old[1])
    parallel = Parallel(pipeline=new[0], tensor=new[1])

    def layers_of(shape) -> set[tuple[int, int]]:
        """12 divides by every number of shards here: (layer, twelfth) pairs."""
        return {(layer, index) for kind, layer, index in has(spec, *shape) if kind == "layer"}

    kv_bytes = len(layers_of(old)) * kv_per_part
    common = len(layers_of(old) & layers_of(new)) * kv_per_part
    slot, stranger = Slot("r-1", new[2], new[3]), Slot("r-2", new[2], new[3])
    weights = reusable_bytes(spec, held, stranger, parallel)
    assert reusable_bytes(spec, held, slot, parallel, kv_bytes=kv_bytes) == weights + common
    assert reusable_bytes(spec, held, stranger, parallel, kv_bytes=kv_bytes) == weights


@given(st.integers(0, 50), st.integers(1, 9), st.integers(0, 1000), st.integers(1, 9))
def test_slices_partition(num_layers: int, pipeline: int, num_bytes: int, tensor: int) -> None:
    stages = [stage_layers(num_layers, pipeline, stage) for stage in range(pipeline)]
    assert [layer for stage in stages for layer in stage] == list(range(num_layers))
    assert max(map(len, stages)) - min(map(len, stages)) <= 1 and sorted(map(len, stages), reverse=True) == list(map(len, stages))
    shards = [shard_bytes(num_bytes, tensor, shard) for shard in range(tensor)]
    assert [each for shard in shards for each in shard] == list(range(num_bytes))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_an_empty_device_has_nothing() -> None:
    assert reusable_bytes(model(2, 10), None, Slot("r-1", 0, 0), Parallel(), kv_bytes=99) == 0


def test_a_slot_finds_all_it_needs_where_it_is() -> None:
    spec, parallel = model(5, 10), Parallel(pipeline=2, tensor=3)
    slots = ReplicaPlan(replica_id="r-1", parallel=parallel).slots
    assert sum(reusable_bytes(spec, HeldSlot(0, slot, 2, 3), slot, parallel) for slot in slots) == spec.weight_bytes


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


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.sets(st.integers(0, 11)), st.integers(0, 3), st.randoms())
def test_kept_replicas_keep_their_devices(pipeline: int, tensor: int, data: int, lost, spare: int, random) -> None:
    """A fleet of one shape loses devices and gains others: who still has all of theirs does not move."""
    spec, parallel = model(6, 12), Parallel(pipeline=pipeline, tensor=tensor)
    replicas = [ReplicaPlan(replica_id=f"r-{index}", parallel=parallel) for index in range(data)]
    slots = [slot for replica in replicas for slot in replica.slots]
    machines = [DeviceId(f"i-{index:02}", 0) for index in range(len(slots) + spare)]
    random.shuffle(machines)
    current = dict(zip(slots, machines, strict=False))
    there = [device for index, device in enumerate(sorted(machines)) if index not in lost]
    holds = {device: HeldSlot(0, slot, pipeline, tensor) for slot, device in current.items()}
    kept = [each for each in replicas if all(current[slot] in there for slot in each.slots)]
    fresh = [
        ReplicaPlan(replica_id=f"a-{index}", parallel=parallel) for index in range(len(there) // parallel.num_slots - len(kept))
    ]
    wanted = [slot for replica in [*fresh, *kept] for slot in replica.slots]
    assume(wanted)
    placed = place(wanted, there, lambda slot, device: reusable_bytes(spec, holds.get(device), slot, parallel), current=current)
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
