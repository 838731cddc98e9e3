"""The smoothed roofline, links and what shards share: by hand, and that more never takes less."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from model_specs import small_spec

from spotserve.core.cut import divides
from spotserve.core.hardware import DeviceType, InstanceType, Link
from spotserve.core.model import Portion
from spotserve.core.plan import Parallel
from spotserve.planner.collectives import all_reduce_s, gather_s, hops
from spotserve.planner.roofline import StepCost, roofline_s
from spotserve.planner.shards import head_cost, head_step_s, layer_cost, layer_step_s, share_held

DEVICE = DeviceType(name="d", memory_bytes=10**9, flops_per_s=1e9, memory_bytes_per_s=1e6, layer_overhead_s=1e-4)
NEAR, FAR = Link(1e-5, 1e8), Link(1e-3, 1e6)


def machine(num_devices: int) -> InstanceType:
    return InstanceType(
        name="i",
        device=DEVICE,
        num_devices=num_devices,
        device_link=NEAR,
        network=FAR,
        host_memory_bytes=10**9,
        host_link=NEAR,
    )


@given(st.floats(0, 1e3), st.floats(1e-9, 1e3))
def test_the_roofline_is_at_least_the_longer_and_at_most_a_quarter_above_it(compute_s: float, memory_s: float) -> None:
    longer_s = max(compute_s, memory_s)
    assert longer_s * (1 - 1e-12) <= roofline_s(compute_s, memory_s) <= longer_s * 2 ** (1 / 3) * (1 + 1e-12)


def test_a_step_is_roofline_and_what_shards_tell_each_other() -> None:
    cost = StepCost(constant_s=1.0, weights_s=2.0, token_s=0.5, pair_s=0.25, kv_token_s=0.1, token_link_s=0.01)
    compute_s, memory_s = 4 * 0.5 + 8 * 0.25, 2.0 + (4 + 10) * 0.1
    assert cost.seconds(4, 8, 10) == pytest.approx((compute_s**3 + memory_s**3) ** (1 / 3) + 1.0 + 4 * 0.01, rel=1e-12)


loads = st.tuples(st.floats(0, 1e4), st.floats(0, 1e7), st.floats(0, 1e6))


@given(loads, loads)
def test_more_in_a_step_never_takes_less(load: tuple[float, float, float], more: tuple[float, float, float]) -> None:
    cost = StepCost(constant_s=1e-4, weights_s=1e-3, token_s=1e-5, pair_s=1e-9, kv_token_s=1e-7, token_link_s=1e-6)
    tokens, pairs, kv = (a + b for a, b in zip(load, more, strict=True))
    assert cost.seconds(tokens, pairs, kv) >= cost.seconds(*load) * (1 - 1e-12)


def test_a_layer_on_one_shard_by_hand() -> None:
    """800 bytes of weights at 1 MB/s, 400 operations per token, 4 * 32 per pair at 1 GFLOPS, 256 bytes of KV per token."""
    cost = layer_cost(small_spec(), 1, machine(1))
    expected = (1e-4, 800e-6, 400e-9, 128e-9, 256e-6, 0.0)
    found = (cost.constant_s, cost.weights_s, cost.token_s, cost.pair_s, cost.kv_token_s, cost.token_link_s)
    assert found == pytest.approx(expected, rel=1e-12)
    assert layer_step_s(small_spec(), 1, machine(1), tokens=2, pairs=3, kv_tokens=4) == cost.seconds(2, 3, 4)


def test_a_layer_on_two_shards_halves_all_but_the_overhead_and_adds_two_sums() -> None:
    alone, shared = (layer_cost(small_spec(), tensor, machine(2)) for tensor in (1, 2))
    halves = (alone.weights_s / 2, alone.token_s / 2, alone.pair_s / 2, alone.kv_token_s / 2)
    assert (shared.weights_s, shared.token_s, shared.pair_s, shared.kv_token_s) == pytest.approx(halves, rel=1e-12)
    assert shared.constant_s == pytest.approx(1e-4 + 2 * 2 * NEAR.latency_s, rel=1e-12)
    assert shared.token_link_s == pytest.approx(2 * (2 * 1 / 2 * 32 * 4) / NEAR.bytes_per_s, rel=1e-12)


def test_what_is_not_divided_is_computed_on_every_shard() -> None:
    grouped = small_spec(num_kv_heads=2, layer=(Portion(1, 100), Portion(2, 100), Portion(4, 600)))
    cost = layer_cost(grouped, 4, machine(4))
    assert cost.weights_s == pytest.approx((100 + 50 + 150) / 1e6, rel=1e-12)
    assert cost.kv_token_s == pytest.approx(2 * 1 * 8 * 4 / 1e6, rel=1e-12), "each of two heads is kept by two shards"
    assert cost.token_s == pytest.approx(400 * 300 / 800 / 1e9, rel=1e-12)


def test_a_head_that_is_divided_gathers_its_logits_and_a_whole_one_does_not() -> None:
    whole, divided = head_cost(small_spec(), 2, machine(2)), head_cost(small_spec(head=(Portion(4, 400),)), 2, machine(2))
    assert (whole.weights_s, whole.constant_s, whole.token_link_s) == (400 / 1e6, 1e-4, 0.0)
    assert divided.weights_s == 200 / 1e6
    assert divided.constant_s == pytest.approx(1e-4 + NEAR.latency_s, rel=1e-12)
    assert divided.token_link_s == pytest.approx(0.5 * 100 * 4 / NEAR.bytes_per_s, rel=1e-9)
    assert head_step_s(small_spec(), 2, machine(2), outputs=3) == whole.seconds(3)


@given(st.integers(1, 128), st.integers(1, 64))
def test_shares_are_those_of_the_cut_and_add_up_to_one_copy_at_least(num_units: int, tensor: int) -> None:
    share = share_held(num_units, tensor)
    assert share * tensor >= 1 - 1e-12
    assert share == 1.0 or (divides(num_units, tensor) and round(share * num_units, 9) == max(1, num_units // tensor))


def test_a_sum_within_a_machine_and_over_machines() -> None:
    assert all_reduce_s(1e6, 1, machine(4)) == 0.0
    local_s = 2 * NEAR.latency_s + 2 * 3 / 4 * 1e6 / NEAR.bytes_per_s
    assert all_reduce_s(1e6, 4, machine(4)) == pytest.approx(local_s, rel=1e-12)
    across_s = 2 * NEAR.latency_s + 2 * 2 * FAR.latency_s + 2 * 11 / 12 * 1e6 / FAR.bytes_per_s
    assert all_reduce_s(1e6, 12, machine(4)) == pytest.approx(across_s, rel=1e-12), "three machines, one ring"
    assert all_reduce_s(1e6, 2, machine(1)) == pytest.approx(2 * FAR.latency_s + 1e6 / FAR.bytes_per_s, rel=1e-12)
    assert gather_s(1e6, 4, machine(4)) == pytest.approx(local_s / 2, rel=1e-12)


@pytest.mark.parametrize(
    ("pipeline", "tensor", "devices", "links"),
    [
        (1, 4, 4, ()),
        (4, 1, 4, (NEAR, NEAR, NEAR, NEAR)),
        (4, 2, 4, (NEAR, FAR, NEAR, FAR)),
        (3, 2, 8, (NEAR, NEAR, NEAR)),
        (2, 8, 4, (FAR, FAR)),
        (3, 3, 4, (FAR, FAR, FAR)),
        (2, 1, 1, (FAR, FAR)),
    ],
)
def test_stages_on_one_machine_talk_over_its_own_link(pipeline: int, tensor: int, devices: int, links: tuple[Link, ...]) -> None:
    assert hops(Parallel(pipeline=pipeline, tensor=tensor), machine(devices)) == links
