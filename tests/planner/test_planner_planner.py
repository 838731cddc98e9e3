"""Plans: as many replicas as fit and are wanted, under names that never change their meaning."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotserve.config import ControllerSettings
from spotserve.core.cluster import DeviceId
from spotserve.core.plan import Parallel, Plan
from spotserve.planner.planner import number_after, plan


def devices(count: int) -> list[DeviceId]:
    return [DeviceId(f"i-{index}", 0) for index in range(count)]


def ids(planned: Plan) -> list[str]:
    return [replica.replica_id for replica in planned.replicas]


def replan(count: int, current: Plan | None, surviving=(), number: int = 1, max_batch: int = 8, **settings: int) -> Plan:
    return plan(
        devices(count),
        current,
        settings=ControllerSettings.model_validate(settings),
        max_batch=max_batch,
        surviving=surviving,
        next_replica_number=number,
    )


@pytest.mark.parametrize(
    ("count", "settings", "replicas"),
    [
        (0, {}, 0),
        (3, {}, 3),
        (3, {"data": 2}, 2),
        (3, {"data": 5}, 3),
        (7, {"pipeline": 2}, 3),
        (7, {"pipeline": 2, "tensor": 2}, 1),
        (3, {"pipeline": 2, "tensor": 2}, 0),
        (16, {"pipeline": 2, "tensor": 2, "data": 3}, 3),
    ],
)
def test_as_many_as_are_wanted_and_fit(count: int, settings: dict[str, int], replicas: int) -> None:
    planned = replan(count, None, **settings)
    assert ids(planned) == [f"r-{number}" for number in range(1, replicas + 1)]
    shape = Parallel(pipeline=settings.get("pipeline", 1), tensor=settings.get("tensor", 1), max_batch=8)
    assert {replica.parallel for replica in planned.replicas} <= {shape}
    assert planned.epoch == 1


def test_a_lost_replica_is_replaced_under_a_new_name() -> None:
    first = replan(3, None)
    second = replan(3, first, surviving={"r-1", "r-3"}, number=4)
    assert ids(second) == ["r-1", "r-3", "r-4"] and second.epoch == 2
    assert second.reason == "3 x (P=1, M=1, B=8) on 3 devices: keep r-1, r-3; add r-4; drop r-2"


def test_too_few_devices_are_told() -> None:
    first = replan(3, None, data=3)
    second = replan(1, first, surviving={"r-2"}, number=4, data=3)
    assert ids(second) == ["r-2"]
    assert second.reason == "1 of 3 wanted x (P=1, M=1, B=8) on 1 device: keep r-2; drop r-1, r-3"


def test_nothing_new_is_the_same_plan() -> None:
    first = replan(4, None, data=3)
    assert replan(3, first, surviving={"r-1", "r-2", "r-3"}, number=4, data=3) is first


def test_no_devices_is_an_empty_plan_once() -> None:
    first = replan(0, None)
    assert ids(first) == [] and first.reason == "0 x (P=1, M=1, B=8) on 0 devices: nothing"
    assert replan(0, first) is first


def test_another_shape_replaces_every_replica() -> None:
    first = replan(4, None)
    second = replan(4, first, surviving=set(ids(first)), number=5, pipeline=2)
    assert ids(second) == ["r-5", "r-6"] and second.epoch == 2
    assert ids(replan(4, first, surviving=set(ids(first)), number=5, max_batch=9)) == ["r-5", "r-6", "r-7", "r-8"]


@given(
    fleets=st.lists(st.tuples(st.integers(0, 9), st.sets(st.integers(0, 8))), min_size=1, max_size=12),
    tensor=st.integers(1, 3),
    wanted=st.one_of(st.none(), st.integers(1, 5)),
)
def test_names_are_never_used_again(fleets: list[tuple[int, set[int]]], tensor: int, wanted: int | None) -> None:
    settings = ControllerSettings(tensor=tensor, data=wanted)
    current: Plan | None = None
    number, gone = 1, set[str]()
    for count, lost in fleets:
        before = [] if current is None else ids(current)
        surviving = {each for index, each in enumerate(before) if index not in lost}
        planned = plan(devices(count), current, settings=settings, max_batch=4, surviving=surviving, next_replica_number=number)
        number = number_after(planned, number)
        after = ids(planned)
        assert len(set(after)) == len(after) == min(count // tensor, wanted or count)
        assert not gone & set(after)
        assert [each for each in after if each in before] == [each for each in before if each in surviving][: len(after)]
        assert (planned is current) == (current is not None and before == after)
        if current is not None and planned is not current:
            assert planned.epoch == current.epoch + 1
        gone |= set(before) - set(after)
        current = planned


def test_a_number_is_not_given_again_when_its_replica_is_gone_from_the_plan() -> None:
    assert number_after(Plan(epoch=9, replicas=(), reason=""), 5) == 5
