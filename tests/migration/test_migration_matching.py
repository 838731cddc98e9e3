"""Placement against brute force: alone, kept together, in pairs that are allowed, and whatever the order."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from migration_scene import MODEL
from placing import every_assignment, scores, total
from scipy.optimize import linear_sum_assignment

from spotserve.core.cluster import DeviceId
from spotserve.core.messages import HeldSlot
from spotserve.core.plan import Parallel, ReplicaPlan, Slot
from spotserve.migration.matching import NEARLY, place, place_freely
from spotserve.migration.scores import Contents, scores_of

sizes = st.sampled_from([3, 1000, 2**40])


def matrices(rows: int, columns: int):
    return sizes.flatmap(
        lambda size: st.lists(st.lists(st.integers(0, size), min_size=columns, max_size=columns), min_size=rows, max_size=rows)
    )


def alone(count: int) -> list[Slot]:
    """Slots of replicas with one slot each."""
    return [Slot(f"r-{index}", 0, 0) for index in range(count)]


def machines(count: int, devices: int = 1) -> list[DeviceId]:
    return [DeviceId(f"i-{index}", device) for index in range(count) for device in range(devices)]


@pytest.mark.parametrize(("rows", "columns"), [*itertools.product(range(1, 8), range(1, 8))])
def test_every_rectangle_up_to_seven_against_all_permutations(rows: int, columns: int) -> None:
    random = np.random.default_rng(rows * 10 + columns)
    small, large = sorted((rows, columns))
    chosen = np.array(list(itertools.permutations(range(large), small)))
    for size in (2, 5, 10**12):
        found = random.integers(0, size, (rows, columns))
        made = scores(found, alone(rows), machines(columns))
        upright = found if rows <= columns else found.T
        heaviest = upright[np.arange(small), chosen].sum(axis=1).max()
        for placed in (place(made, nearly=0).devices, place_freely(made).devices):
            assert len(placed) == small and total(made, placed) == heaviest


@given(st.data(), st.integers(1, 4), st.integers(1, 4))
def test_pairs_that_are_not_allowed_are_never_chosen_and_cost_no_other_pair(data, rows: int, columns: int) -> None:
    found = data.draw(matrices(rows, columns))
    allowed = data.draw(st.lists(st.lists(st.booleans(), min_size=columns, max_size=columns), min_size=rows, max_size=rows))
    made = scores(found, alone(rows), machines(columns), allowed=allowed)
    every = every_assignment(made)
    for placed in (place(made, nearly=0).devices, place_freely(made).devices):
        assert placed in every, "as many pairs as can be, all of them allowed"
        assert total(made, placed) == max(total(made, each) for each in every)


@given(st.data(), st.integers(1, 5), st.integers(1, 5), st.randoms())
def test_the_order_of_slots_and_devices_does_not_matter(data, rows: int, columns: int, random) -> None:
    found, slots, devices = data.draw(matrices(rows, columns)), alone(rows), machines(columns)
    placed = place(scores(found, slots, devices))
    mixed_rows, mixed_columns = list(range(rows)), list(range(columns))
    random.shuffle(mixed_rows)
    random.shuffle(mixed_columns)
    again = scores(
        [[found[row][column] for column in mixed_columns] for row in mixed_rows],
        [slots[row] for row in mixed_rows],
        [devices[column] for column in mixed_columns],
    )
    assert place(again) == placed


def test_nothing_to_place_or_nowhere() -> None:
    replica = ReplicaPlan(replica_id="r-1", parallel=Parallel())
    for replicas, devices in (([], machines(1)), ([replica], []), ([], [])):
        for model in (None, MODEL):
            made = scores_of(model, replicas, devices, {})
            assert place(made).devices == {} and place_freely(made).devices == {}


# --------------------------------------------------------------------------- stages kept together


def stages(count: int, shards: int) -> list[Slot]:
    return [Slot("r-1", stage, shard) for stage in range(count) for shard in range(shards)]


def is_together(devices: dict[Slot, DeviceId]) -> bool:
    """Whether no stage is on two instances."""
    where: dict[tuple[str, int], set[str]] = {}
    for slot, device in devices.items():
        where.setdefault((slot.replica_id, slot.stage), set()).add(device.instance_id)
    return all(len(instances) == 1 for instances in where.values())


@settings(max_examples=40)
@given(
    st.data(), st.sampled_from([(1, 2, 3, 2), (2, 2, 2, 2), (2, 2, 1, 4), (1, 2, 2, 3), (2, 2, 1, 5), (1, 3, 2, 3), (2, 3, 2, 3)])
)
def test_two_levels_keep_their_bounds(data, case) -> None:
    """At least F / s and B / k; B itself where an instance has room for one block."""
    count, shards, instances, devices = case
    slots, places = stages(count, shards), machines(instances, devices)
    found = data.draw(matrices(len(slots), len(places)))
    made = scores(found, slots, places)
    placed = place(made, nearly=0).devices
    assert len(placed) == len(slots) and is_together(placed)
    every = every_assignment(made)
    freely = max(total(made, each) for each in every)
    together = max(total(made, each) for each in every if is_together(each))
    room, largest = devices // shards, shards + devices % shards
    assert total(made, place_freely(made).devices) == freely
    assert total(made, placed) * largest >= freely and total(made, placed) * room >= together
    assert room > 1 or total(made, placed) == together


def heaviest_together(found: np.ndarray, count: int, shards: int, instances: int, devices: int) -> int:
    """Every way to give stages to instances, and Kuhn-Munkres on each instance."""
    best = 0
    for chosen in itertools.product(range(instances), repeat=count):
        if max(chosen.count(instance) for instance in chosen) * shards > devices:
            continue
        weight = 0
        for instance in range(instances):
            rows = [stage * shards + shard for stage in range(count) if chosen[stage] == instance for shard in range(shards)]
            part = found[rows][:, instance * devices : (instance + 1) * devices]
            weight += int(part[linear_sum_assignment(part, maximize=True)].sum())
        best = max(best, weight)
    return best


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([(3, 2, 2, 4), (4, 2, 2, 4), (3, 2, 3, 5), (4, 1, 2, 2), (3, 2, 2, 6)]),
    st.floats(0.2, 1),
)
def test_instances_with_room_for_several_stages_keep_the_bound(seed, case, density) -> None:
    """At least B / k; single slots are placed best."""
    count, shards, instances, devices = case
    random = np.random.default_rng(seed)
    found = random.integers(0, 10, (count * shards, instances * devices))
    found[random.random(found.shape) > density] = 0
    made = scores(found, stages(count, shards), machines(instances, devices))
    placed = place(made, nearly=0).devices
    together = heaviest_together(found, count, shards, instances, devices)
    assert is_together(placed) and len(placed) == count * shards
    assert total(made, placed) <= together <= total(made, placed) * (devices // shards)
    assert shards > 1 or total(made, placed) == together


@given(st.data(), st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=3), st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_instances_and_stages_of_several_sizes(data, shards, devices) -> None:
    """As many slots as devices; the largest stages, which choose first, are on one instance while there is one."""
    slots = [Slot(f"r-{index}", 0, shard) for index, number in enumerate(shards) for shard in range(number)]
    places = [DeviceId(f"i-{index}", device) for index, number in enumerate(devices) for device in range(number)]
    made = scores(data.draw(matrices(len(slots), len(places))), slots, places)
    placed = place(made).devices
    assert len(placed) == len(set(placed.values())) == min(len(slots), len(places))
    largest = max(shards)
    whole = [
        {slot: device for slot, device in placed.items() if slot.replica_id == f"r-{index}"}
        for index, number in enumerate(shards)
        if number == largest
    ]
    room = sum(number // largest for number in devices)
    assert sum(len(each) == largest and is_together(each) for each in whole) >= min(len(whole), room)


def test_a_stage_wider_than_any_instance_is_halved() -> None:
    made = scores(np.zeros((8, 8)), stages(1, 8), machines(2, 4))
    placed = place(made).devices
    for half in (range(4), range(4, 8)):
        assert len({placed[Slot("r-1", 0, shard)].instance_id for shard in half}) == 1


def test_an_instance_deals_its_devices_out_among_all_that_it_was_given() -> None:
    """Two stages of two shards where one of four was: each shard finds its half twice, on devices that are not neighbours."""
    found = np.zeros((4, 4))
    for row, slot in enumerate(stages(2, 2)):
        found[row, [2 * slot.shard, 2 * slot.shard + 1]] = 10
    placed = place(made := scores(found, stages(2, 2), machines(1, 4))).devices
    assert total(made, placed) == 40


def test_devices_that_belong_together_need_not_be_neighbours() -> None:
    """The first instance has all that both stages need, on devices that are neither neighbours nor every second one."""
    found = np.zeros((4, 4))
    found[[0, 1, 2, 3], [0, 3, 1, 2]] = 10
    placed = place(made := scores(found, stages(2, 2), machines(1, 4))).devices
    assert total(made, placed) == 40


def test_instances_are_chosen_by_what_they_have_and_not_by_which_devices_are_neighbours() -> None:
    """Dealt out to neighbours, both stages find 10 on the first instance and 11 on the second; in truth 20 and 11."""
    found = np.zeros((4, 8))
    for row, slot in enumerate(stages(2, 2)):
        found[row, [2 * slot.shard, 2 * slot.shard + 1]] = 10
        found[row, [4 + slot.shard, 6 + slot.shard]] = 5.5
    placed = place(made := scores(found * 2, stages(2, 2), machines(2, 4))).devices
    assert total(made, placed) == 80


def test_a_replica_goes_to_its_type_of_machine_only() -> None:
    replicas = [
        ReplicaPlan(replica_id="r-1", parallel=Parallel(), instance_type="small"),
        ReplicaPlan(replica_id="r-2", parallel=Parallel(), instance_type="large"),
        ReplicaPlan(replica_id="r-3", parallel=Parallel()),
    ]
    devices = machines(3)
    types = {"i-0": "large", "i-1": "small"}
    held = {devices[1]: Contents((HeldSlot(0, Slot("r-2", 0, 0), Parallel()),))}
    placed = place(scores_of(MODEL, replicas, devices, held, instance_types=types)).devices
    assert {slot.replica_id: device.instance_id for slot, device in placed.items()} == {"r-1": "i-1", "r-2": "i-0", "r-3": "i-2"}


# --------------------------------------------------------------------------- who stays, who is sooner


@given(
    st.integers(1, 3), st.sampled_from([1, 2, 4]), st.integers(1, 3), st.sets(st.integers(0, 11)), st.integers(0, 3), st.randoms()
)
def test_kept_replicas_keep_their_devices(pipeline: int, tensor: int, data: int, lost, spare: int, random) -> None:
    """A fleet of one shape loses devices and gains others: who still has all of theirs does not move."""
    parallel = Parallel(pipeline=pipeline, tensor=tensor)
    replicas = [ReplicaPlan(replica_id=f"r-{index}", parallel=parallel) for index in range(data)]
    slots = [slot for replica in replicas for slot in replica.slots]
    places = [DeviceId(f"i-{index:02}", 0) for index in range(len(slots) + spare)]
    random.shuffle(places)
    current = dict(zip(slots, places, strict=False))
    there = [device for index, device in enumerate(sorted(places)) if index not in lost]
    holds = {device: Contents((HeldSlot(0, slot, parallel),)) for slot, device in current.items()}
    kept = [each for each in replicas if all(current[slot] in there for slot in each.slots)]
    fresh = [
        ReplicaPlan(replica_id=f"a-{index}", parallel=parallel) for index in range(len(there) // parallel.num_slots - len(kept))
    ]
    assume([*fresh, *kept])
    placed = place(scores_of(MODEL, [*fresh, *kept], there, holds), current=current)
    for replica in kept:
        assert all(placed.devices[slot] == current[slot] for slot in replica.slots)


@given(st.data(), st.integers(1, 3), st.integers(1, 2), st.integers(1, 2))
def test_of_equally_heavy_assignments_the_one_where_most_stay(data, count: int, shards: int, devices: int) -> None:
    assume(devices >= shards)
    slots, places = stages(count, shards), machines(count, devices)
    made = scores(data.draw(matrices(len(slots), len(places))), slots, places)
    homes = data.draw(st.permutations(places))
    current = dict(zip(slots, homes, strict=False))
    placed = place(made, current=current, nearly=0).devices
    every = [each for each in every_assignment(made) if is_together(each) and total(made, each) == total(made, placed)]

    def staying(each) -> int:
        return sum(current[slot] == device for slot, device in each.items())

    if shards == 1 or devices < 2 * shards:
        assert staying(placed) == max(map(staying, every))


def test_bytes_come_before_staying() -> None:
    stays, moves = Slot("r-1", 0, 0), Slot("r-2", 0, 0)
    old, new = DeviceId("i-1", 0), DeviceId("i-2", 0)
    made = scores([[10, 10], [1, 0]], [stays, moves], [old, new])
    assert place(made, current={stays: old, moves: new}).devices == {stays: new, moves: old}


def test_large_fleets_of_large_models_can_be_placed() -> None:
    slots = [Slot(f"r-{index:03}", 0, 0) for index in range(300)]
    devices = [DeviceId(f"i-{index:03}", 0) for index in range(300)]
    current = dict(zip(slots, reversed(devices), strict=True))
    made = scores(np.full((300, 300), 2**40), slots, devices)
    assert place(made, current=current).devices == current


def busiest(made, devices) -> float:
    busy: dict[str, float] = {}
    for slot, device in devices.items():
        seconds = made.fetch_s[made.kinds[made.slots.index(slot)], made.devices.index(device)]
        busy[device.instance_id] = busy.get(device.instance_id, 0.0) + seconds
    return max(busy.values())


@settings(max_examples=60)
@given(st.data(), st.integers(1, 3), st.integers(1, 2), st.integers(0, 1), st.sampled_from([0.01, 0.2]))
def test_of_nearly_equal_assignments_the_one_whose_busiest_port_has_least(data, count, shards, spare, nearly) -> None:
    slots, places = stages(count, shards), machines(count + spare, shards)
    found = data.draw(matrices(len(slots), len(places)))
    fetch = data.draw(
        st.lists(st.lists(st.integers(0, 9), min_size=len(places), max_size=len(places)), min_size=len(slots), max_size=len(slots))
    )
    for row in fetch:  # what crosses the port of an instance is the same for all of its devices
        row[:] = [row[column - column % shards] for column in range(len(places))]
    made = scores(found, slots, places, fetch=fetch)
    placed = place(made, nearly=nearly).devices
    heaviest = total(made, place(made, nearly=0).devices)
    assert total(made, placed) >= (1 - nearly) * heaviest
    near = [each for each in every_assignment(made) if is_together(each) and total(made, each) >= (1 - nearly) * heaviest]
    assert busiest(made, placed) == min(busiest(made, each) for each in near)


def test_a_slot_that_stays_is_not_moved_to_end_sooner() -> None:
    slots, places = alone(2), machines(2)
    made = scores([[1000, 1000], [1000, 1000]], slots, places, fetch=[[0, 0], [9, 0]])
    current = {slots[0]: places[1], slots[1]: places[0]}
    assert place(made, current=current).devices == current
    assert busiest(made, place(made).devices) == 0
    assert math.isclose(NEARLY, 0.01), "of the bytes: what the documents say"
