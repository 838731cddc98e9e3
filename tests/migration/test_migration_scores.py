"""Bytes that slots find on devices, against counting them one by one."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st
from migration_scene import MODEL, fitting_shapes, has, size_of

from spotserve.core.cluster import DeviceId
from spotserve.core.cut import stage_cuts, units_held
from spotserve.core.messages import HeldSlot
from spotserve.core.plan import Parallel, ReplicaPlan, Slot
from spotserve.migration.scores import Contents, inheritable_kv_bytes, reusable_bytes, scores_of


def parallel_of(shape) -> Parallel:
    return Parallel(pipeline=shape[0], tensor=shape[1])


def held_of(shape, replica_id: str = "r-1") -> HeldSlot:
    return HeldSlot(0, Slot(replica_id, shape[2], shape[3]), parallel_of(shape))


@given(st.lists(fitting_shapes, max_size=2), fitting_shapes)
def test_reusable_bytes_are_those_that_both_have(old, new) -> None:
    there = set().union(*(has(*shape) for shape in old))
    expected = size_of(there & has(*new))
    assert reusable_bytes(MODEL, [held_of(shape) for shape in old], Slot("r-2", new[2], new[3]), parallel_of(new)) == expected


@given(fitting_shapes, fitting_shapes, st.integers(0, 50))
def test_kv_counts_as_far_as_layers_and_heads_are_common(old, new, tokens: int) -> None:
    def parts(shape) -> set[tuple[int, int]]:
        layers = stage_cuts(MODEL, shape[0])[shape[2]]
        return set(itertools.product(layers, units_held(MODEL.num_kv_heads, shape[1], shape[3])))

    expected = len(parts(old) & parts(new)) * tokens * MODEL.kv_bytes_per_token // (MODEL.num_layers * MODEL.num_kv_heads)
    assert inheritable_kv_bytes(MODEL, held_of(old), Slot("r-2", new[2], new[3]), parallel_of(new), tokens) == expected


def test_a_slot_finds_all_it_needs_where_it_is() -> None:
    parallel = Parallel(pipeline=2, tensor=2)
    for slot in ReplicaPlan(replica_id="r-1", parallel=parallel).slots:
        needed = size_of(has(2, 2, slot.stage, slot.shard))
        assert reusable_bytes(MODEL, [HeldSlot(0, slot, parallel)], slot, parallel) == needed


contents = st.builds(
    lambda weights, kv: Contents(tuple(map(held_of, weights)), tuple((held_of(shape), tokens) for shape, tokens in kv)),
    st.lists(fitting_shapes, max_size=2),
    st.lists(st.tuples(fitting_shapes, st.integers(0, 50)), max_size=2),
)


@settings(max_examples=30)
@given(
    st.lists(st.sampled_from([(1, 1), (2, 1), (1, 2), (3, 4)]), max_size=3),
    st.dictionaries(st.builds(DeviceId, st.sampled_from(["i-1", "i-2"]), st.integers(0, 2)), contents, max_size=5),
    st.integers(0, 5),
)
def test_the_table_says_what_counting_pair_by_pair_says(shapes, there, num_free: int) -> None:
    replicas = [ReplicaPlan(replica_id=f"r-{index}", parallel=parallel_of(shape)) for index, shape in enumerate(shapes)]
    free = [*sorted(there)[:num_free], DeviceId("i-3", 0)]
    made = scores_of(MODEL, replicas, free, there, network_bytes_per_s={"i-1": 2.0})
    parallel = {slot: replica.parallel for replica in replicas for slot in replica.slots}
    assert set(made.slots) == set(parallel) and set(made.devices) == set(free) and made.allowed.all()
    for row, slot in enumerate(made.slots):
        needed = size_of(has(parallel[slot].pipeline, parallel[slot].tensor, slot.stage, slot.shard))
        for column, device in enumerate(made.devices):
            here = there.get(device, Contents())
            expected = reusable_bytes(MODEL, here.weights, slot, parallel[slot]) + sum(
                inheritable_kv_bytes(MODEL, live, slot, parallel[slot], tokens) for live, tokens in here.kv
            )
            near = [each for other, its in there.items() if other.instance_id == device.instance_id for each in its.weights]
            lacking = needed - reusable_bytes(MODEL, near, slot, parallel[slot])
            assert made.found_bytes[made.kinds[row], column] == expected
            assert made.fetch_s[made.kinds[row], column] == lacking / (2.0 if device.instance_id == "i-1" else 1.0)
