"""The tree of shapes: which branches end, and what a replica serves while nobody waits."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_specs import small_spec
from planner_speeds import RooflineSpeed, machine

from spotserve.core.hardware import InstanceType
from spotserve.core.plan import Parallel
from spotserve.planner.shapes import Shape, calmer, grow, room_for
from spotserve.planner.speed import ReplicaSpeed
from spotserve.planner.unhindered import Unhindered
from spotserve.planner.workload import Lengths, Objective, Workload

MACHINE = machine("six", num_devices=6)
WORKLOAD = Workload(1.0, Lengths.fixed(100), Lengths.fixed(101))
NO_LIMITS = Objective()
TWELVE_HEADS = small_spec(num_layers=12, num_heads=12, num_kv_heads=12, layer=(), head=())


def speed(parallel: Parallel, *, kv_tokens: int = 2010, weights_s: float = 0.01) -> RooflineSpeed:
    return RooflineSpeed(parallel.max_batch, kv_tokens, weights_s / parallel.num_slots, 1e-3, 0.0, 1e-5, parallel.pipeline, 1e-3)


def shapes_of(limits: Objective = NO_LIMITS, *, refuse: int = 0) -> tuple[list[Shape], list[Shape], list[str]]:
    def speed_of(parallel: Parallel, kind: InstanceType) -> ReplicaSpeed | str:
        return speed(parallel) if parallel.num_slots > refuse else "too small"

    tree = grow(TWELVE_HEADS, MACHINE, 24, WORKLOAD, limits, speed_of=speed_of, max_batch=100)
    return tree.shapes, tree.dominated, [f"{loser.what}: {loser.why}" for loser in tree.losers]


def test_shards_fit_into_a_machine_or_onto_whole_ones() -> None:
    shapes, dominated, losers = shapes_of()
    assert {shape.parallel.tensor for shape in shapes + dominated} == {1, 2, 3, 6, 12}
    assert all(shape.size <= 24 for shape in shapes + dominated)
    assert not losers, "24 shards would leave twelve without a head: nobody asks"


def test_b_is_the_largest_power_of_two_that_the_cache_has_room_for() -> None:
    assert room_for(speed(Parallel()), WORKLOAD) == 10
    assert {shape.parallel.max_batch for shape in shapes_of()[0]} == {8}


def test_refused_branches_are_told_once_per_number_of_shards() -> None:
    shapes, dominated, losers = shapes_of(refuse=2)
    assert min(shape.size for shape in shapes + dominated) == 3
    assert losers == ["P=1..2, M=1 on six: too small", "P=1, M=2 on six: too small"]
    _, _, strict = shapes_of(Objective(tpot_s=0.004))
    assert strict[0] == "P=1..12, M=1 on six: even alone on it, each token takes 0.023 s, the limit is 0.004 s"


def test_what_two_shallower_pipelines_do_as_well_is_dominated() -> None:
    shapes, dominated, _ = shapes_of()
    served = {(shape.parallel.pipeline, shape.parallel.tensor): shape for shape in shapes + dominated}
    assert dominated
    for shape in dominated:
        deep, tensor = shape.parallel.pipeline, shape.parallel.tensor
        pairs = [(served.get((part, tensor)), served.get((deep - part, tensor))) for part in range(1, deep)]
        sums = [a.capacity_rps + b.capacity_rps for a, b in pairs if a is not None and b is not None]
        assert max(sums) >= shape.capacity_rps * (1 - 1e-6)


def test_deep_pipelines_are_tried_where_the_longest_stage_gets_shorter() -> None:
    shapes, dominated, _ = shapes_of()
    assert sorted(shape.parallel.pipeline for shape in shapes + dominated if shape.parallel.tensor == 1) == [1, 2, 3, 4, 6, 12]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 64), st.floats(1e-4, 0.05), st.floats(0.0, 0.5), st.floats(0.0, 30.0))
def test_more_run_at_once_the_looser_the_limits(batch: int, weights_s: float, tpot_s: float, e2e_s: float) -> None:
    unhindered = Unhindered.of(speed(Parallel(max_batch=batch), kv_tokens=10_000, weights_s=weights_s), WORKLOAD)
    tight, loose = Objective(tpot_s=tpot_s, e2e_s=e2e_s), Objective(tpot_s=2 * tpot_s, e2e_s=2 * e2e_s)
    assert 0 <= unhindered.rps(tight) <= unhindered.rps(loose) * (1 + 1e-9) <= unhindered.rps(Objective()) * (1 + 1e-6)
    running = unhindered.most_running(tight)
    assert running == 0 or unhindered.met(running).keeps(tight)
    assert running == unhindered.most or not unhindered.met(max(1.0, running * 1.002)).keeps(tight)


def test_capacity_is_what_a_step_and_the_prompts_leave() -> None:
    unhindered = Unhindered.of(RooflineSpeed(8, 100_000, 0.012, 1e-3, 0.0, 1e-5, 1, 0.0), WORKLOAD)
    assert unhindered.rps(Objective()) == pytest.approx(1 / (0.012 + 100e-5 + 101 * (0.012 + 8e-3) / 8))


def test_a_calm_shape_runs_what_the_limits_allow() -> None:
    def speed_of(parallel: Parallel, kind: InstanceType) -> ReplicaSpeed | str:
        return speed(parallel, kv_tokens=100_000)

    top = Shape.of(Parallel(max_batch=64), MACHINE, speed(Parallel(max_batch=64), kv_tokens=100_000), WORKLOAD)
    limits = Objective(tpot_s=0.0165)
    assert 4 < top.unhindered.most_running(limits) < 8
    assert calmer(top, WORKLOAD, limits, speed_of).parallel == Parallel(max_batch=8)
    assert calmer(top, WORKLOAD, Objective(tpot_s=1.0), speed_of) is top
    assert calmer(top, WORKLOAD, limits, lambda parallel, kind: "no") is top
