"""Verdicts on sequences of a replica that goes away."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from model_specs import small_spec

from spotserve.core.messages import Address, SequenceAction, SequenceOrder, SequenceReport
from spotserve.core.model import Portion
from spotserve.migration.verdicts import Destination, InstanceSpeed, decide, fallback, margin_s, spread

MODEL = small_spec(
    name="m",
    num_layers=5,
    num_kv_heads=5,
    head_size=5,
    vocabulary_size=1,
    context_tokens=1000,
    layer=(Portion(1, 1),),
    embedding=(Portion(1, 1),),
    head=(Portion(1, 1),),
    value_bytes=4,
)
"""1000 bytes of KV per token."""

SPEED = InstanceSpeed(step_s=0.02, prefill_tokens_per_s=2000.0, link_bytes_per_s=1e8)


def sequence(name: str = "s", *, context: int = 200, computed: int | None = None, remaining: int = 1000) -> SequenceReport:
    return SequenceReport(name, context, context - 1 if computed is None else computed, remaining)


def destination(name: str = "r-2", *, free: int = 8, speed: InstanceSpeed = SPEED) -> Destination:
    return Destination(name, f"i-{name}", Address(name, 1), free, speed)


def orders(
    *sequences: SequenceReport, left_s: float = 10.0, source: InstanceSpeed = SPEED, to: tuple[Destination, ...] | None = None
) -> tuple[SequenceOrder, ...]:
    to = (destination(),) if to is None else to
    return decide(sequences, now_s=100.0, deadline_s=100.0 + left_s, source=source, destinations=to, model=MODEL)


FINISH, MOVE, RESUME = SequenceAction.FINISH, SequenceAction.MOVE, SequenceAction.RESUME


@pytest.mark.parametrize(
    ("case", "expected", "reason"),
    [
        (
            {"remaining": 100},
            FINISH,
            "finish 100 tokens in 2.0 s; deadline in 10.0 s",
        ),
        (
            {"remaining": 490},  # 9.8 s, inside the deadline but not inside the margin
            MOVE,
            "move 199.0 kB in 2 ms < recompute 200 tokens in 100 ms; deadline in 10.0 s",
        ),
        ({"computed": 0}, RESUME, "recompute 200 tokens in 100 ms: no KV to move; deadline in 10.0 s"),
        (
            {"left_s": 0.201},
            RESUME,
            "recompute 200 tokens in 100 ms: moving 199.0 kB would end in 2 ms; deadline in 201 ms",
        ),
        (
            {"to": (destination(speed=InstanceSpeed(0.02, 2000.0, 1e6)),)},
            RESUME,
            "recompute 200 tokens in 100 ms: moving 199.0 kB takes 199 ms; deadline in 10.0 s",
        ),
        (
            {"source": InstanceSpeed(0.0, 0.0, 0.0)},
            RESUME,
            "recompute 200 tokens in 100 ms: speed of the link not known; deadline in 10.0 s",
        ),
        (
            {"to": (destination(speed=InstanceSpeed(0.0, 0.0, 1e8)),)},
            MOVE,
            "move 199.0 kB in 2 ms < recompute 200 tokens; deadline in 10.0 s",
        ),
        (
            {"to": (destination(free=0),)},
            RESUME,
            "recompute 200 tokens in 100 ms: r-2 has no room for its KV; deadline in 10.0 s",
        ),
        ({"to": ()}, RESUME, "nowhere to go; deadline in 10.0 s"),
        (
            {"left_s": -3.0, "remaining": 1},
            RESUME,
            "recompute 200 tokens in 100 ms: moving 199.0 kB would end in 2 ms; deadline in -3.0 s",
        ),
        # Half of a long prompt is computed: moving that half and computing the rest beats computing everything.
        ({"context": 800, "computed": 400}, MOVE, "move 400.0 kB in 4 ms < recompute 800 tokens in 400 ms; deadline in 10.0 s"),
    ],
)
def test_one_sequence(case: dict, expected: SequenceAction, reason: str) -> None:
    report = sequence(**{key: value for key, value in case.items() if key in ("context", "computed", "remaining")})
    (order,) = orders(report, **{key: value for key, value in case.items() if key in ("left_s", "source", "to")})
    assert (order.action, order.reason) == (expected, reason)
    assert (order.destination is not None) == (expected is MOVE)
    assert (order.destination_replica_id is not None) == (expected is not FINISH and case.get("to") != ())


def test_one_flow_leaves_at_a_time_and_the_most_computed_goes_first() -> None:
    slow = InstanceSpeed(0.02, 200.0, 1e5)  # 1 s for 100 tokens; 1.8 s are usable of 2 s
    reports = [sequence("a", context=51), sequence("b", context=101), sequence("c", context=41), sequence("d", context=31)]
    made = orders(*reports, left_s=2.0, source=slow, to=(destination(speed=InstanceSpeed(0.02, 10.0, 1e5)),))
    assert [(each.request_id, each.action) for each in made] == [("b", MOVE), ("a", MOVE), ("c", RESUME), ("d", MOVE)]
    assert "would end in 1.9 s" in made[2].reason


def test_what_finishes_here_does_not_take_the_port() -> None:
    slow = InstanceSpeed(0.001, 200.0, 1e5)
    reports = [sequence("long", context=151, remaining=5), sequence("other", context=101, remaining=2000)]
    made = orders(*reports, left_s=1.3, source=slow, to=(destination(speed=InstanceSpeed(0.02, 10.0, 1e9)),))
    assert [(each.request_id, each.action) for each in made] == [("long", FINISH), ("other", MOVE)]


def test_destinations_share_the_load() -> None:
    to = (destination("r-4", free=1), destination("r-2", free=3), destination("r-3", free=2))
    made = orders(*(sequence(f"s-{index}") for index in range(8)), to=to)
    assert Counter(each.destination_replica_id for each in made[:6]) == {"r-2": 3, "r-3": 2, "r-4": 1}
    assert [each.action for each in made] == [MOVE] * 6 + [RESUME] * 2
    assert made[0].destination == Address("r-2", 1)


def test_sequences_that_are_computed_again_wait_for_each_other() -> None:
    first, second = orders(sequence("a", computed=0), sequence("b", computed=0))
    assert "in 100 ms" in first.reason and "in 200 ms" in second.reason


def test_fallback_goes_where_there_is_room() -> None:
    order = fallback([destination("r-3", free=5), destination("r-2", free=5), destination("r-4", free=1)])
    assert (order.request_id, order.action, order.destination_replica_id) == ("", RESUME, "r-2")
    assert order.destination == Address("r-2", 1), "what does not finish in time is moved there"
    assert (fallback([]).destination_replica_id, fallback([]).destination) == (None, None)


speeds = st.builds(
    InstanceSpeed,
    st.sampled_from([0.0, 0.001, 0.02, 0.5]),
    st.sampled_from([0.0, 10.0, 2000.0, 1e6]),
    st.sampled_from([0.0, 1e4, 1e6, 1e9]),
)
reports = st.lists(
    st.tuples(st.integers(1, 900), st.floats(0, 1), st.integers(1, 900)).map(
        lambda each: (each[0], int(each[0] * each[1]), each[2])
    ),
    max_size=12,
).map(lambda rows: [SequenceReport(f"s-{index}", *row) for index, row in enumerate(rows)])
places = st.lists(st.tuples(st.integers(-3, 5), speeds), max_size=4).map(
    lambda rows: tuple(destination(f"r-{index}", free=free, speed=speed) for index, (free, speed) in enumerate(rows))
)
times = st.floats(-2, 120)


@given(reports, speeds, places, times)
def test_every_sequence_gets_one_order_that_can_be_carried_out(sequences, source, to, left_s) -> None:
    made = orders(*sequences, left_s=left_s, source=source, to=to)
    assert Counter(each.request_id for each in made) == Counter(each.request_id for each in sequences)
    by_id = {each.request_id: each for each in sequences}
    by_replica = {each.replica_id: each for each in to}
    usable_s = left_s - margin_s(left_s)
    sent_s, moved = 0.0, Counter[str]()
    for order in made:
        report = by_id[order.request_id]
        if order.action is FINISH:
            assert 0 < report.remaining_tokens * source.step_s <= usable_s < left_s
            assert order.destination_replica_id is None
        elif order.action is MOVE:
            target = by_replica[order.destination_replica_id]
            link = min(source.link_bytes_per_s, target.speed.link_bytes_per_s)
            sent_s += report.computed_tokens * 1000 / link
            moved[target.replica_id] += 1
            assert report.computed_tokens > 0 and sent_s <= usable_s + 1e-9
            assert order.destination == target.address
        else:
            assert (order.destination_replica_id is None) == (not to)
    assert all(count <= by_replica[name].free_sequences for name, count in moved.items())


@given(reports, speeds, places, times, times)
def test_more_time_finishes_more(sequences, source, to, first_s, second_s) -> None:
    less, more = (
        {each.request_id for each in orders(*sequences, left_s=left_s, source=source, to=to) if each.action is FINISH}
        for left_s in sorted((first_s, second_s))
    )
    assert less <= more


@given(reports.filter(bool), speeds, places, times, times)
def test_more_time_is_never_worse_for_a_sequence_alone(sequences, source, to, first_s, second_s) -> None:
    rank = {RESUME: 0, MOVE: 1, FINISH: 2}
    less, more = (
        rank[orders(sequences[0], left_s=left_s, source=source, to=to)[0].action] for left_s in sorted((first_s, second_s))
    )
    assert less <= more


@given(reports, speeds, places, times, st.randoms())
def test_orders_do_not_depend_on_the_order_of_reports(sequences, source, to, left_s, random) -> None:
    made = orders(*sequences, left_s=left_s, source=source, to=to)
    random.shuffle(sequences)
    assert orders(*sequences, left_s=left_s, source=source, to=tuple(reversed(to))) == made


def test_sequences_of_a_replaced_replica_are_spread_evenly_by_context() -> None:
    made = spread(
        [sequence(f"s-{index}", context=context) for index, context in enumerate([70, 300, 20, 250])],
        [destination("r-2"), destination("r-3")],
    )
    assert [each.request_id for each in made] == ["s-1", "s-3", "s-0", "s-2"], "the longest first"
    assert {each.action for each in made} == {MOVE}
    by_place = Counter[str]()
    for order in made:
        by_place[order.destination_replica_id] += {"s-0": 70, "s-1": 300, "s-2": 20, "s-3": 250}[order.request_id]
    assert by_place == {"r-2": 320, "r-3": 320}


def test_a_destination_that_has_much_gets_less() -> None:
    busy = Destination("r-2", "i-r-2", Address("r-2", 1), 8, SPEED, context_tokens=500)
    made = spread([sequence("a", context=200), sequence("b", context=200)], [busy, destination("r-3")])
    assert {each.destination_replica_id for each in made} == {"r-3"}


def test_a_replaced_replicas_fallback_moves() -> None:
    assert fallback([destination("r-2")], MOVE).action is MOVE
    assert fallback([], MOVE).action is RESUME


@given(reports, places)
def test_spread_keeps_to_the_room_and_leaves_nobody_out(sequences, to) -> None:
    made = spread(sequences, to)
    assert Counter(each.request_id for each in made) == Counter(each.request_id for each in sequences)
    by_id = {each.request_id: each for each in sequences}
    moved = Counter(each.destination_replica_id for each in made if each.action is MOVE)
    assert all(moved[each.replica_id] <= max(0, each.free_sequences) for each in to)
    for order in made:
        assert order.action in (MOVE, RESUME)
        assert (order.destination_replica_id is None) == (not to)
        assert order.action is RESUME or by_id[order.request_id].computed_tokens > 0
    room = sum(max(0, each.free_sequences) for each in to)
    given_places = Counter(each.destination_replica_id for each in made[:room])
    assert all(given_places[each.replica_id] <= max(0, each.free_sequences) for each in to), "room is used up before any is full"
    again = spread(list(reversed(sequences)), list(reversed(to)))
    assert again == made
