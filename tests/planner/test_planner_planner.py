"""Plans: as many replicas as fit and are wanted, under names that never change their meaning."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from model_specs import small_spec

from spotserve.core.cut import misfit
from spotserve.core.model import ModelSpec, Portion
from spotserve.core.plan import Parallel, Plan
from spotserve.planner.planner import Shape, fitting_shape, number_after, plan, refusal

MODEL = small_spec(
    name="m",
    num_layers=4,
    num_kv_heads=4,
    head_size=8,
    vocabulary_size=100,
    context_tokens=512,
    layer=(Portion(4, 800),),
    embedding=(Portion(1, 400),),
    head=(Portion(1, 400),),
    value_bytes=4,
)


def ids(planned: Plan) -> list[str]:
    return [replica.replica_id for replica in planned.replicas]


def replan(
    count: int,
    current: Plan | None,
    surviving=(),
    number: int = 1,
    max_batch: int = 8,
    data: int | None = None,
    pipeline: int = 1,
    tensor: int = 1,
    model: ModelSpec | None = None,
) -> Plan:
    return plan(
        count,
        current,
        wanted=Shape(data, pipeline, tensor),
        model=model,
        max_batch=max_batch,
        surviving=[] if current is None else [replica for replica in current.replicas if replica.replica_id in surviving],
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
        (0, {"pipeline": 2, "tensor": 2}, 0),
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
    current: Plan | None = None
    number, gone = 1, set[str]()
    for count, lost in fleets:
        before = [] if current is None else ids(current)
        surviving = {each for index, each in enumerate(before) if index not in lost}
        planned = replan(count, current, surviving, number, 4, wanted, tensor=tensor)
        number = number_after(ids(planned), number)
        after = ids(planned)
        shards = fitting_shape(Shape(wanted, 1, tensor), count, None)[1]
        assert len(set(after)) == len(after) == min(count // shards, wanted or count)
        assert not gone & set(after)
        same = current is not None and all(each.parallel.tensor == shards for each in current.replicas)
        kept = [each for each in before if each in surviving] if same else []
        assert [each for each in after if each in before] == kept[: len(after)]
        assert (planned is current) == (current is not None and before == after)
        if current is not None and planned is not current:
            assert planned.epoch == current.epoch + 1
        gone |= set(before) - set(after)
        current = planned


def test_a_number_is_not_given_again_when_its_replica_is_gone_from_the_plan() -> None:
    assert number_after([], 5) == 5
    assert number_after(["r-7", "r-2"], 5) == 8


@pytest.mark.parametrize(
    ("count", "wanted", "model", "expected"),
    [
        (4, (2, 2), MODEL, (2, 2)),
        (3, (2, 2), MODEL, (1, 2)),  # the shards are kept, with fewer stages
        (1, (2, 2), MODEL, (1, 1)),
        (3, (1, 4), MODEL, (1, 2)),  # 4 units cannot be cut into 3
        (3, (2, 4), MODEL, (1, 2)),
        (3, (4, 1), MODEL, (3, 1)),
        (9, (6, 1), MODEL, (4, 1)),  # 4 layers
        (9, (1, 3), MODEL, (1, 2)),
        (3, (1, 4), None, (1, 2)),  # nothing is known of the model: only a divisor of 4 is sure to fit when 4 does
        (3, (3, 2), None, (1, 2)),
        (0, (2, 2), MODEL, (2, 2)),
    ],
)
def test_too_few_devices_and_misfits_make_do_with_less(
    count: int, wanted: tuple[int, int], model: ModelSpec | None, expected: tuple[int, int]
) -> None:
    pipeline, tensor, why = fitting_shape(Shape(None, *wanted), count, model)
    assert (pipeline, tensor) == expected
    assert bool(why) == (expected != wanted)


@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 6))
def test_what_is_made_do_with_can_run_and_is_no_larger(count: int, pipeline: int, tensor: int) -> None:
    stages, shards, _ = fitting_shape(Shape(None, pipeline, tensor), count, MODEL)
    assert stages * shards <= count and stages <= pipeline and shards <= tensor
    assert misfit(MODEL, stages, shards) is None
    larger = [(p, m) for m in range(shards, tensor + 1) for p in range(1, pipeline + 1) if m > shards or p > stages]
    assert all(p * m > count or misfit(MODEL, p, m) is not None for p, m in larger), "shards first, then stages"


def test_the_reason_names_what_is_missing() -> None:
    planned = replan(1, None, pipeline=2)
    assert planned.reason.endswith("add r-1; not (P=2, M=1): a replica takes 2 devices, there is 1")


@pytest.mark.parametrize(
    ("wanted", "count", "says"),
    [
        (Shape(2, 2, 1), 4, None),
        (Shape(2, 2, 1), 3, "2,2,1 takes 4 devices, there are 3"),
        (Shape(None, 2, 1), 1, "auto,2,1 takes 2 devices at least, there is 1"),
        (Shape(1, 5, 1), 9, "m has 4 layers: it cannot be cut into 5 stages"),
    ],
)
def test_what_is_refused(wanted: Shape, count: int, says: str | None) -> None:
    assert refusal(wanted, count, MODEL) == says
