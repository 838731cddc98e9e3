"""Routing: only to who serves, to whom has most room, and always the same way."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotserve.core.cluster import ReplicaState
from spotserve.core.messages import Address, Route
from spotserve.router import most_held, pick


def route(name: str, max_batch: int = 4, state: ReplicaState = ReplicaState.SERVING) -> Route:
    return Route(replica_id=name, instance_id=f"i-{name}", address=Address("host", 1), state=state, max_batch=max_batch)


A, B, C = route("a"), route("b"), route("c", max_batch=40)


@pytest.mark.parametrize(
    ("routes", "load", "choice", "expected"),
    [
        ([], {}, {}, None),
        ([A, B], {}, {}, A),
        ([B, A], {}, {}, A),
        ([A, B], {"a": 1}, {}, B),
        ([A, B, C], {"a": 1, "b": 2, "c": 9}, {}, C),
        ([A, B, C], {"a": 1, "b": 2, "c": 10}, {}, A),
        ([A, B], {"a": 9, "b": 7}, {}, B),
        ([A, B], {"a": 3}, {"prefer": "a"}, A),
        ([A, B], {"a": 4}, {"prefer": "a"}, B),
        ([A, B], {"b": 1}, {"prefer": "unknown"}, A),
        ([A, B], {}, {"exclude": {"a"}}, B),
        ([A, B], {}, {"exclude": {"a"}, "prefer": "a"}, B),
        ([A, B], {}, {"exclude": ["a", "b"]}, None),
    ],
)
def test_pick(routes: list[Route], load: dict[str, int], choice: dict, expected: Route | None) -> None:
    assert pick(routes, load, **choice) == expected


def test_what_may_wait_elsewhere_does_not_wait_at_a_full_replica() -> None:
    """Beyond its batch a replica has a little ahead; of small batches one."""
    assert (most_held(4), most_held(1), most_held(32)) == (5, 2, 40)
    assert pick([A], {"a": 4}, may_wait=False) == A
    assert pick([A, B], {"a": 5, "b": 5}, may_wait=False) is None
    assert pick([A, B], {"a": 5, "b": 5}) == A
    assert pick([A], {"a": 3}, prefer="a", may_wait=False) == A


@pytest.mark.parametrize("state", [state for state in ReplicaState if state is not ReplicaState.SERVING])
def test_nothing_goes_to_a_replica_that_does_not_serve(state: ReplicaState) -> None:
    assert pick([route("a", state=state)], {}, prefer="a") is None
    assert pick([route("a", state=state), B], {"b": 100}, prefer="a") == B


@given(
    st.lists(st.tuples(st.integers(1, 9), st.sampled_from(ReplicaState)), max_size=8),
    st.lists(st.integers(0, 20), min_size=8, max_size=8),
    st.randoms(),
)
def test_choice_does_not_depend_on_order_and_nobody_has_more_room(replicas, loads, random) -> None:
    routes = [route(f"r-{index}", batch, state) for index, (batch, state) in enumerate(replicas)]
    load = {each.replica_id: loads[index] for index, each in enumerate(routes)}
    chosen = pick(routes, load)
    shuffled = routes[:]
    random.shuffle(shuffled)
    assert pick(shuffled, load) == chosen
    serving = [each for each in routes if each.state is ReplicaState.SERVING]
    assert (chosen is None) == (not serving)
    if chosen is not None:
        for other in serving:
            assert load[chosen.replica_id] * other.max_batch <= load[other.replica_id] * chosen.max_batch


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(0, 40))
def test_load_spreads_in_proportion(batches: list[int], count: int) -> None:
    routes = [route(f"r-{index}", batch) for index, batch in enumerate(batches)]
    load = {each.replica_id: 0 for each in routes}
    for _ in range(count):
        chosen = pick(routes, load)
        assert chosen is not None
        load[chosen.replica_id] += 1
    if count <= sum(batches):
        assert all(load[each.replica_id] <= each.max_batch for each in routes)
