"""Where missing weights come from, against sets of single units: every byte that somebody has is taken once, and no other."""

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from migration_scene import MODEL, fitting_shapes, has, size_of

from spotserve.core.cluster import DeviceId
from spotserve.core.messages import Address, HeldSlot, WeightTransfer
from spotserve.core.plan import Parallel, Slot
from spotserve.migration import sources
from spotserve.migration.sources import weight_transfers

devices = st.builds(DeviceId, st.sampled_from(["i-1", "i-2", "i-3"]), st.integers(0, 2))
fleets = st.dictionaries(devices, st.lists(fitting_shapes, max_size=2), max_size=7)
Shape = tuple[int, int, int, int]


def has_layers(shape: Shape) -> set[int]:
    return {unit[0] for unit in has(*shape)}


def rank(device: DeviceId) -> Address:
    return Address(device.instance_id, device.index)


def transfers_of(
    wanted: dict[DeviceId, Shape], fleet: dict[DeviceId, list[Shape]], reachable: set[DeviceId] | None = None, **more
) -> dict[DeviceId, tuple[WeightTransfer, ...]]:
    return weight_transfers(
        MODEL,
        {
            device: (Slot("r-9", shape[2], shape[3]), Parallel(pipeline=shape[0], tensor=shape[1]))
            for device, shape in wanted.items()
        },
        {
            device: [
                HeldSlot(device.index, Slot("r-1", shape[2], shape[3]), Parallel(pipeline=shape[0], tensor=shape[1]))
                for shape in shapes
            ]
            for device, shapes in fleet.items()
        },
        {device: rank(device) for device in (fleet if reachable is None else reachable)},
        **more,
    )


@given(st.dictionaries(devices, fitting_shapes, min_size=1, max_size=4), fleets, st.sets(devices))
def test_what_is_missing_and_somewhere_is_taken_once_and_nothing_else(wanted, fleet, unreachable) -> None:
    reachable = fleet.keys() - unreachable
    made = transfers_of(wanted, fleet, reachable)
    assert made.keys() == wanted.keys()
    memory = {device: set().union(*(has(*shape) for shape in shapes)) for device, shapes in fleet.items()}
    for device, shape in wanted.items():
        missing = has(*shape) - memory.get(device, set())
        for transfer in made[device]:
            assert transfer.source in reachable and transfer.source != device and transfer.rank == rank(transfer.source)
            taken = {unit for unit in missing & memory[transfer.source] if unit[0] == transfer.layer}
            assert transfer.num_bytes == size_of(taken) > 0
            missing -= taken
        others = set().union(*(memory[source] for source in reachable if source != device))
        assert not missing & others, "the rest is nowhere: it is read from files"
        layers = [transfer.layer for transfer in made[device]]
        assert layers == sorted(layers), "the first layers come first"


@given(st.dictionaries(devices, fitting_shapes, min_size=1, max_size=4), fleets, st.randoms())
def test_transfers_do_not_depend_on_the_order_of_devices(wanted, fleet, random) -> None:
    mixed, mixed_wanted = list(fleet.items()), list(wanted.items())
    random.shuffle(mixed)
    random.shuffle(mixed_wanted)
    assert transfers_of(dict(mixed_wanted), dict(mixed)) == transfers_of(wanted, fleet)


def test_the_same_instance_is_asked_first() -> None:
    whole: Shape = (1, 1, 0, 0)
    here, there = DeviceId("i-2", 1), DeviceId("i-1", 0)
    made = transfers_of({DeviceId("i-2", 0): whole}, {there: [whole], here: [whole]})
    assert {transfer.source for transfer in made[DeviceId("i-2", 0)]} == {here}


def test_sources_share_the_load() -> None:
    whole: Shape = (1, 1, 0, 0)
    sources = [DeviceId("i-1", index) for index in range(3)]
    made = transfers_of({DeviceId("i-2", 0): whole, DeviceId("i-3", 0): whole}, {source: [whole] for source in sources})
    given_bytes: Counter[DeviceId] = Counter()
    for transfers in made.values():
        for transfer in transfers:
            given_bytes[transfer.source] += transfer.num_bytes
    assert sum(given_bytes.values()) == 2 * MODEL.weight_bytes
    assert max(given_bytes.values()) - min(given_bytes.values()) <= MODEL.layer_bytes


def test_two_shards_give_what_a_whole_layer_needs() -> None:
    first, second = DeviceId("i-1", 0), DeviceId("i-1", 1)
    made = transfers_of({DeviceId("i-2", 0): (5, 1, 2, 0)}, {first: [(1, 2, 0, 0)], second: [(1, 2, 0, 1)]})
    (one, other) = made[DeviceId("i-2", 0)]
    assert (one.layer, other.layer) == (2, 2)
    assert one.num_bytes == 40 + 7 + 12 + 5 and other.num_bytes == 40 + 7 + 12, "what both have is taken from one"


@given(st.dictionaries(devices, fitting_shapes, min_size=1, max_size=4), fleets, st.sets(st.sampled_from(["i-1", "i-2", "i-3"])))
def test_what_only_dying_instances_have_comes_first(wanted, fleet, dying) -> None:
    made = transfers_of(wanted, fleet, dying=dying)
    memory = {device: set().union(*(has(*shape) for shape in shapes)) for device, shapes in fleet.items()}
    for device, shape in wanted.items():
        missing = has(*shape) - memory.get(device, set())
        staying = set().union(*(memory[each] for each in memory if each != device and each.instance_id not in dying))
        leaving = set().union(*(memory[each] for each in memory if each != device and each.instance_id in dying))
        at_risk = {unit[0] for unit in (missing & leaving) - staying}
        order = [(transfer.layer not in at_risk, transfer.layer) for transfer in made[device]]
        assert order == sorted(order)


def test_the_last_copy_of_a_middle_layer_comes_before_the_first_layer() -> None:
    whole: Shape = (1, 1, 0, 0)
    staying: list[Shape] = [(5, 1, stage, 0) for stage in (0, 1, 3, 4)]
    fleet = {DeviceId("i-1", 0): [whole]} | {DeviceId("i-2", shape[2]): [shape] for shape in staying}
    made = transfers_of({DeviceId("i-3", 0): whole}, fleet, dying={"i-1"})[DeviceId("i-3", 0)]
    assert [transfer.layer for transfer in made] == [2, -1, 0, 1, 3, 4, 5]


def network_load(made: dict[DeviceId, tuple[WeightTransfer, ...]]) -> int:
    """What the busiest instance sends over the network."""
    sent: Counter[str] = Counter()
    for device, transfers in made.items():
        for transfer in transfers:
            sent[transfer.source.instance_id] += transfer.num_bytes * (transfer.source.instance_id != device.instance_id)
    return max(sent.values(), default=0)


@settings(max_examples=60)
@given(
    st.sets(st.sampled_from(range(4)), min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 4)), min_size=1, max_size=6),
)
def test_the_busiest_sender_is_near_the_best_of_all_choices(receivers, senders) -> None:
    """Copies that overlap in all sorts of ways; layers are what is dealt out, so one layer is as near as dealing can get."""
    wanted: dict[DeviceId, Shape] = {DeviceId(f"n-{index}", 0): (1, 1, 0, 0) for index in receivers}
    fleet = {DeviceId(f"i-{index}", 0): [(pipeline, 1, stage % pipeline, 0)] for index, (pipeline, stage) in enumerate(senders)}
    layers = {device: {unit[0] for unit in has(*shapes[0])} for device, shapes in fleet.items()}
    sizes = {layer: size_of({unit for unit in has(1, 1, 0, 0) if unit[0] == layer}) for layer in range(-1, 6)}
    # any set of layers has to be sent by those who have one of them: the mean over these is a bound (a fractional optimum)
    bound = max(
        len(receivers)
        * sum(
            size for layer, size in sizes.items() if (holders := {d for d in fleet if layer in layers[d]}) and holders <= set(some)
        )
        / len(some)
        for number in range(1, len(fleet) + 1)
        for some in itertools.combinations(sorted(fleet), number)
    )
    assert bound - 1e-6 <= network_load(transfers_of(wanted, fleet)) <= bound + max(sizes.values())


def test_a_slow_sender_gives_less() -> None:
    whole: Shape = (1, 1, 0, 0)
    slow, fast = DeviceId("i-1", 0), DeviceId("i-2", 0)
    speeds = {"i-1": 1.0, "i-2": 3.0, "n-1": 9.0}
    made = transfers_of({DeviceId("n-1", 0): whole}, {slow: [whole], fast: [whole]}, network_bytes_per_s=speeds)
    given_bytes: Counter[DeviceId] = Counter()
    for transfer in made[DeviceId("n-1", 0)]:
        given_bytes[transfer.source] += transfer.num_bytes
    assert given_bytes[fast] > 2 * given_bytes[slow] > 0


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(devices, fitting_shapes, min_size=1, max_size=2),
    st.lists(fitting_shapes, min_size=1, max_size=2),
    st.sets(st.integers(0, 59)),
    st.booleans(),
)
def test_of_many_who_are_alike_a_few_are_asked_and_the_same_ones_give(wanted, held, dying, is_one_slow) -> None:
    fleet = {DeviceId(f"j-{number:02}", 0): [held[number % len(held)]] for number in range(60)}
    speeds = dict.fromkeys(("i-1", "i-2", "i-3"), 1.0) | {each.instance_id: 1.0 + is_one_slow for each in fleet}
    options = {"dying": {f"j-{number:02}" for number in dying}, "network_bytes_per_s": speeds | {"j-07": 0.5}}
    asked: list[tuple[int, int]] = []
    few = sources._Ports._few

    def noted(self, alike):
        asked.append((len(alike), len(few(self, alike))))
        return few(self, alike)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources._Ports, "_few", noted)
        made = transfers_of(wanted, fleet, **options)
        patch.setattr(sources._Ports, "_few", lambda self, alike: alike)
        assert made == transfers_of(wanted, fleet, **options)
    # beside the slow one no more than there can be transfers, and one
    most = 1 + sum(len(has_layers(shape)) for shape in wanted.values()) * len(set(held))
    assert all(number <= most + 1 for _, number in asked)
