"""Schedules replayed by a simple clock: one flow per port side, nothing late, nothing without room, and near the bound."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spotserve.core.cluster import DeviceId
from spotserve.core.hardware import Link
from spotserve.migration.flows import Flow, InstanceLinks
from spotserve.migration.groups import groups
from spotserve.migration.room import Leaving, Memory
from spotserve.migration.schedule import Schedule, schedule

INSTANCES = ["i-1", "i-2", "i-3", "i-4"]
LINKS = {
    "i-1": InstanceLinks(Link(0.0, 1.0), Link(0.0, 4.0)),
    "i-2": InstanceLinks(Link(0.0, 1.0), Link(0.0, 4.0)),
    "i-3": InstanceLinks(Link(0.0, 2.0), Link(0.0, 4.0)),
    "i-4": InstanceLinks(Link(0.5, 1.0), Link(0.0, 4.0)),
}
ALIKE = {instance: InstanceLinks(Link(0.0, 1.0), Link(0.0, 1.0)) for instance in INSTANCES}
NOW_S = 100.0

devices = st.builds(DeviceId, st.sampled_from(INSTANCES), st.integers(0, 1))


def flow(source: DeviceId, destination: DeviceId, num_bytes: int, what: str = "w", **more) -> Flow:
    return Flow(what, source, destination, num_bytes, **more)


@st.composite
def all_flows(draw, most: int = 14, size: int = 9) -> list[Flow]:
    pairs = draw(st.lists(st.tuples(devices, devices).filter(lambda pair: pair[0] != pair[1]), max_size=most))
    return [
        flow(
            source,
            destination,
            draw(st.integers(1, size)),
            f"w-{index}",
            is_last_copy=draw(st.booleans()),
            rank=(draw(st.integers(0, 1)), draw(st.integers(-2, 2))),
        )
        for index, (source, destination) in enumerate(pairs)
    ]


deadlines = st.dictionaries(st.sampled_from(INSTANCES), st.integers(0, 40).map(lambda left: NOW_S + left))


@st.composite
def memories(draw, flows: list[Flow]) -> Memory:
    free = draw(st.dictionaries(devices, st.integers(0, 12)))
    leaving = []
    for index, device in enumerate(draw(st.lists(devices, max_size=6))):
        reading = [each for each in flows if each.source == device]
        readers = draw(st.sets(st.sampled_from(reading))) if reading else set()
        from_s = NOW_S + draw(st.sampled_from([-5, 0, 7]))
        leaving.append(Leaving(f"l-{index}", device, draw(st.integers(1, 9)), frozenset(readers), from_s, draw(st.booleans())))
    return Memory(free, tuple(leaving))


def sides(each: Flow) -> list[tuple]:
    """What a flow takes for itself, said in another way than the code says it."""
    if each.source.instance_id == each.destination.instance_id:
        return [("device sends", each.source), ("device receives", each.destination)]
    return [("instance sends", each.source.instance_id), ("instance receives", each.destination.instance_id)]


def check(made: Schedule, flows: list[Flow], links, ends=None, memory: Memory | None = None) -> None:
    """Replays a schedule; raises where it does what it must not."""
    sent = [each.flow for each in made.timed]
    assert sorted(map(repr, [*sent, *made.late, *made.from_files, *made.without_room])) == sorted(map(repr, flows))
    spans: dict[tuple, list[tuple[float, float]]] = {}
    for each in made.timed:
        assert each.start_s >= NOW_S and each.end_s == pytest.approx(each.start_s + each.flow.seconds(links))
        for end in (each.flow.source, each.flow.destination):
            assert each.end_s <= (ends or {}).get(end.instance_id, float("inf"))
        for side in sides(each.flow):
            spans.setdefault(side, []).append((each.start_s, each.end_s))
    for some in spans.values():
        some.sort()
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(some)), "two flows on one side of a port"
    bound = max((sum(end - start for start, end in some) for some in spans.values()), default=0.0)
    assert made.lower_bound_s == pytest.approx(bound)
    assert made.makespan_s == pytest.approx(max((each.end_s for each in made.timed), default=NOW_S) - NOW_S)
    assert made.makespan_s >= made.lower_bound_s - 1e-9
    if memory is not None:
        check_memory(made, memory)


def check_memory(made: Schedule, memory: Memory) -> None:
    ended = {each.flow: each.end_s for each in made.timed}
    evicted = {each.leaving: each.at_s for each in made.evicted}
    for leaving, at_s in evicted.items():
        assert leaving.on_files and at_s >= leaving.from_s
        assert all(reader in made.from_files or ended.get(reader, 0.0) <= at_s for reader in leaving.readers)
    for each in made.timed:
        device = each.flow.destination
        if device not in memory.free_bytes:
            continue
        there = sum(
            other.flow.num_bytes for other in made.timed if other.flow.destination == device and other.start_s <= each.start_s
        )
        gone = 0
        for leaving in memory.leaving:
            goes_s = max([leaving.from_s, *(ended.get(reader, 0.0) for reader in leaving.readers)])
            if leaving.device == device and min(goes_s, evicted.get(leaving, goes_s)) <= each.start_s:
                gone += leaving.num_bytes
        assert there <= memory.free_bytes[device] + gone


@settings(max_examples=60)
@given(all_flows(), deadlines)
def test_ports_are_exclusive_and_deadlines_kept(flows, ends) -> None:
    made = schedule(flows, links=LINKS, now_s=NOW_S, deadlines_s=ends)
    check(made, flows, LINKS, ends)
    assert not made.from_files and not made.without_room
    assert all(any(end.instance_id in ends for end in (each.source, each.destination)) for each in made.late)


@given(st.data(), all_flows(most=8), deadlines)
def test_memory_never_exceeds_the_bound(data, flows, ends) -> None:
    memory = data.draw(memories(flows))
    made = schedule(flows, links=LINKS, now_s=NOW_S, deadlines_s=ends, memory=memory)
    check(made, flows, LINKS, ends, memory)
    for each in made.without_room:
        assert each.destination in memory.free_bytes


@settings(max_examples=50)
@given(st.data(), all_flows(most=8), deadlines, st.randoms())
def test_the_order_of_flows_does_not_matter(data, flows, ends, random) -> None:
    memory = data.draw(memories(flows))
    made = schedule(flows, links=LINKS, now_s=NOW_S, deadlines_s=ends, memory=memory)
    random.shuffle(flows)
    assert schedule(flows, links=LINKS, now_s=NOW_S, deadlines_s=ends, memory=memory) == made


@settings(max_examples=50)
@given(all_flows(most=10))
def test_whoever_can_send_does(flows) -> None:
    """Without memory and deadlines no flow waits while both of its ports are free."""
    made = schedule(flows, links=ALIKE, now_s=NOW_S)
    for each in made.timed:
        others = [other for other in made.timed if set(sides(other.flow)) & set(sides(each.flow)) and other is not each]
        moments = {NOW_S, *(other.end_s for other in others)}
        for moment in moments:
            if moment < each.start_s:
                assert any(other.start_s <= moment < other.end_s for other in others)


def can_all_be_in_time(flows: list[Flow], ends) -> bool:
    """Every way to choose whole-second starts; all durations are whole seconds, so no others are needed."""
    lengths = [each.num_bytes for each in flows]
    last = [
        int(min(ends.get(end.instance_id, NOW_S + 99) for end in (each.source, each.destination)) - NOW_S) - each.num_bytes
        for each in flows
    ]
    clashes = [
        (first, second)
        for first, second in itertools.combinations(range(len(flows)), 2)
        if set(sides(flows[first])) & set(sides(flows[second]))
    ]
    return any(
        all(
            starts[first] + lengths[first] <= starts[second] or starts[second] + lengths[second] <= starts[first]
            for first, second in clashes
        )
        for starts in itertools.product(*(range(max(0, min(each, 9) + 1)) for each in last))
    )


@settings(max_examples=120)
@given(
    st.lists(st.tuples(st.sampled_from(INSTANCES[:3]), st.sampled_from(INSTANCES[:3]), st.integers(1, 3)), min_size=2, max_size=4),
    st.lists(st.tuples(st.sampled_from(INSTANCES[:3]), st.sampled_from(INSTANCES[:3]), st.integers(1, 3)), max_size=2),
    st.fixed_dictionaries({instance: st.integers(2, 8).map(lambda left: NOW_S + left) for instance in INSTANCES[:3]}),
)
def test_last_copies_are_all_in_time_whenever_that_can_be(last, others, ends) -> None:
    flows = [
        flow(DeviceId(source, 0), DeviceId(destination, 0), num_bytes, f"w-{index}", is_last_copy=index < len(last))
        for index, (source, destination, num_bytes) in enumerate([*last, *others])
        if source != destination
    ]
    made = schedule(flows, links=ALIKE, now_s=NOW_S, deadlines_s=ends)
    check(made, flows, ALIKE, ends)
    mattering = [each for each in flows if each.is_last_copy]
    if can_all_be_in_time(mattering, ends):
        assert not any(each.is_last_copy for each in made.late)


def test_a_port_stays_idle_when_a_last_copy_needs_that() -> None:
    """To send at once what can be sent would keep a port until after the deadline of what it has to send next."""
    one, two, three, four = (DeviceId(each, 0) for each in INSTANCES)
    flows = [
        flow(one, three, 3, "long", is_last_copy=True),
        flow(one, two, 1, "second", is_last_copy=True),
        flow(four, two, 1, "first", is_last_copy=True),
    ]
    ends = {"i-4": NOW_S + 1, "i-2": NOW_S + 2}
    made = schedule(flows, links=ALIKE, now_s=NOW_S, deadlines_s=ends)
    assert {each.flow.what: each.start_s - NOW_S for each in made.timed} == {"first": 0, "second": 1, "long": 2}


@given(st.lists(st.frozensets(st.integers(0, 12), min_size=1, max_size=3), max_size=10))
def test_groups_are_the_closure_of_sharing(keys) -> None:
    related = [{other for other, some in enumerate(keys) if some & mine} for mine in keys]
    for _ in keys:
        related = [set().union(*(related[other] for other in mine)) for mine in related]
    expected = sorted({tuple(sorted(mine)) for mine in related})
    assert [tuple(each) for each in groups(keys)] == expected


@settings(max_examples=40)
@given(all_flows(most=8), all_flows(most=8))
def test_independent_parts_do_not_know_of_each_other(ours, theirs) -> None:
    def elsewhere(device: DeviceId) -> DeviceId:
        return DeviceId(f"j-{device.instance_id}", device.index)

    theirs = [replace(each, source=elsewhere(each.source), destination=elsewhere(each.destination)) for each in theirs]
    links = LINKS | {f"j-{instance}": each for instance, each in LINKS.items()}
    apart = [schedule(flows, links=links, now_s=NOW_S) for flows in (ours, theirs)]
    together = schedule([*ours, *theirs], links=links, now_s=NOW_S)
    assert set(together.timed) == {each for part in apart for each in part.timed}
    assert together.makespan_s == max(part.makespan_s for part in apart)


# --------------------------------------------------------------------------- what comes first

HERE, THERE, AWAY = (DeviceId(each, 0) for each in INSTANCES[:3])


def test_importance() -> None:
    """What would be lost, then KV of the most advanced, then weights of the front stages, then the longest."""
    flows = [
        flow(HERE, THERE, 5, "stage 1", rank=(1, 1)),
        flow(HERE, THERE, 3, "stage 0", rank=(1, 0)),
        flow(HERE, THERE, 4, "stage 0, longer", rank=(1, 0)),
        flow(HERE, THERE, 1, "KV of 10", rank=(0, -10)),
        flow(HERE, THERE, 2, "KV of 20", rank=(0, -20)),
        flow(HERE, THERE, 1, "last copy", rank=(1, 7), is_last_copy=True),
    ]
    made = schedule(flows, links=ALIKE, now_s=NOW_S)
    assert [each.flow.what for each in made.timed] == ["last copy", "KV of 20", "KV of 10", "stage 0, longer", "stage 0", "stage 1"]


def test_ports_that_many_wait_for_do_not_wait() -> None:
    """The longest first would keep i-4 from sending to i-2 what ends last; by what its ports have left to do it goes at once."""
    sizes = {("i-4", "i-2"): 4, ("i-3", "i-2"): 2, ("i-3", "i-4"): 5, ("i-1", "i-4"): 5}
    flows = [flow(DeviceId(source, 0), DeviceId(to, 0), size, f"{source}-{to}") for (source, to), size in sizes.items()]
    made = schedule(flows, links=ALIKE, now_s=NOW_S)
    assert made.makespan_s == made.lower_bound_s == 10


# --------------------------------------------------------------------------- memory


def test_two_devices_that_are_full_exchange_what_they_have_piece_by_piece() -> None:
    """Each sends two pieces and takes two; there is room for one."""
    to = [flow(HERE, THERE, 4, f"to-{index}") for index in range(2)]
    fro = [flow(THERE, HERE, 4, f"fro-{index}") for index in range(2)]
    leaving = [Leaving(each.what, each.source, 4, frozenset({each}), NOW_S, on_files=True) for each in (*to, *fro)]
    memory = Memory({HERE: 4, THERE: 4}, tuple(leaving))
    made = schedule([*to, *fro], links=ALIKE, now_s=NOW_S, memory=memory)
    check(made, [*to, *fro], ALIKE, memory=memory)
    assert len(made.timed) == 4 and not made.evicted and made.makespan_s == 8


def test_where_nothing_can_go_on_what_files_have_is_evicted_and_said() -> None:
    """Both are full to the last byte: one gives up its piece, takes the other's, and the other reads from files."""
    to, fro = flow(HERE, THERE, 4, "to"), flow(THERE, HERE, 6, "fro")
    leaving = [Leaving("to", HERE, 6, frozenset({to}), NOW_S, on_files=True), Leaving("fro", THERE, 6, frozenset({fro}), NOW_S)]
    memory = Memory({HERE: 0, THERE: 0}, tuple(leaving))
    made = schedule([to, fro], links=ALIKE, now_s=NOW_S, memory=memory)
    check(made, [to, fro], ALIKE, memory=memory)
    assert [each.flow for each in made.timed] == [fro] and made.from_files == (to,)
    assert [(each.leaving.what, each.at_s) for each in made.evicted] == [("to", NOW_S)]


def test_what_serves_is_waited_for_and_not_evicted() -> None:
    arriving = flow(HERE, THERE, 4, "new")
    memory = Memory({THERE: 1}, (Leaving("old", THERE, 5, frozenset(), NOW_S + 7, on_files=True),))
    made = schedule([arriving], links=ALIKE, now_s=NOW_S, memory=memory)
    assert [each.start_s for each in made.timed] == [NOW_S + 7] and not made.evicted


def test_small_things_do_not_take_the_room_of_important_ones_unless_nothing_else_can_be_done() -> None:
    important, small = flow(HERE, THERE, 4, "important"), flow(AWAY, THERE, 2, "small", rank=(1, 0))
    waiting = Memory({THERE: 3}, (Leaving("old", THERE, 3, frozenset(), NOW_S + 5),))
    made = schedule([important, small], links=ALIKE, now_s=NOW_S, memory=waiting)
    assert [(each.flow.what, each.start_s - NOW_S) for each in made.timed] == [("important", 5), ("small", 9)]
    made = schedule([important, small], links=ALIKE, now_s=NOW_S, memory=Memory({THERE: 3}))
    assert [each.flow for each in made.timed] == [small] and made.without_room == (important,)


@settings(max_examples=150)
@given(all_flows(most=30), st.sampled_from([LINKS, ALIKE]))
def test_where_only_ports_are_in_the_way_it_is_found_sooner_and_the_same(flows, links) -> None:
    """A deadline that nothing can miss takes the way that looks at every flow at every turn."""
    far = dict.fromkeys(INSTANCES, NOW_S + 1000000.0)
    assert schedule(flows, links=links, now_s=NOW_S) == schedule(flows, links=links, now_s=NOW_S, deadlines_s=far)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 29), st.integers(0, 1), st.integers(1, 3)), min_size=40, max_size=90))
def test_the_same_where_many_give_and_few_take(transfers) -> None:
    wide = [f"s-{number:02}" for number in range(30)] + ["d-0", "d-1"]
    links = dict.fromkeys(wide, InstanceLinks(Link(0.0, 1.0), Link(0.0, 1.0)))
    flows = [
        flow(DeviceId(f"s-{source:02}", 0), DeviceId(f"d-{taker}", 0), size, f"w-{index}", rank=(1, index % 2))
        for index, (source, taker, size) in enumerate(transfers)
    ]
    far = dict.fromkeys(wide, NOW_S + 1e6)
    assert schedule(flows, links=links, now_s=NOW_S) == schedule(flows, links=links, now_s=NOW_S, deadlines_s=far)
