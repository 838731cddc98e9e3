"""The cost of a replica: figures that were worked out elsewhere, what fits, and that nothing gets cheaper by asking for more."""

from typing import Any

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from model_specs import small_spec

from spotserve.core.cut import held_bytes, misfit
from spotserve.core.hardware import DeviceType, InstanceType, Link
from spotserve.core.model import Portion
from spotserve.core.plan import Parallel
from spotserve.planner.cost import ReplicaCost, replica_cost
from spotserve.planner.devices import instance_type
from spotserve.planner.memory import USABLE_SHARE, activation_bytes, stage_weight_bytes
from spotserve.planner.models import named_model
from spotserve.planner.shards import head_step_s, layer_step_s
from spotserve.planner.speed import ReplicaSpeed

LLAMA_70B, LLAMA_7B, GPT_20B = named_model("llama-2-70b"), named_model("llama-2-7b"), named_model("gpt-20b")


def cost_of(model: Any, hardware: InstanceType, **shape: Any) -> ReplicaCost:
    cost = replica_cost(model, Parallel(**shape), hardware)
    assert isinstance(cost, ReplicaCost), cost
    return cost


def without(hardware: InstanceType, **device: Any) -> InstanceType:
    """`hardware` with links that take no time, and devices that differ."""
    free = Link(0.0, 1e30)
    changed = msgspec.structs.replace(hardware.device, **device)
    return msgspec.structs.replace(hardware, device=changed, device_link=free, network=free)


def tiny(memory_bytes: int = 10**9, num_devices: int = 4) -> InstanceType:
    device = DeviceType(name="tiny", memory_bytes=memory_bytes, flops_per_s=1e9, memory_bytes_per_s=1e9, layer_overhead_s=1e-5)
    near, far = Link(1e-5, 1e9), Link(1e-4, 1e8)
    return InstanceType(
        name="tiny",
        device=device,
        num_devices=num_devices,
        device_link=near,
        network=far,
        host_memory_bytes=10**9,
        host_link=near,
    )


@pytest.mark.parametrize(
    ("instance", "tensor", "step_s"), [("g5.12xlarge", 4, 0.077), ("g4dn.12xlarge", 4, 0.143), ("p4d.24xlarge", 8, 0.014)]
)
def test_a_decode_step_streams_the_weights(instance: str, tensor: int, step_s: float) -> None:
    """138 GB over the bandwidth that all devices together reach, worked out by hand."""
    hardware = without(instance_type(instance), memory_bytes=10**12, layer_overhead_s=0.0)
    assert cost_of(LLAMA_70B, hardware, tensor=tensor).token_s(1, 100) == pytest.approx(step_s, rel=0.06)


def test_a_prompt_computes_two_operations_per_weight() -> None:
    hardware = without(instance_type("p4d.24xlarge"), memory_bytes=10**12, layer_overhead_s=0.0)
    tokens = 4096
    weights = LLAMA_7B.num_layers * LLAMA_7B.layer_flops_per_token / 2
    pairs = tokens * (tokens + 1) / 2
    expected_s = (2 * weights * tokens + 4 * 4096 * 32 * pairs) / hardware.device.flops_per_s
    cost = cost_of(LLAMA_7B, hardware)
    assert cost.first_token_s(tokens) == pytest.approx(expected_s, rel=0.01)
    assert cost.prompt_s(tokens) == cost.first_token_s(tokens)


def test_stages_of_a_pipeline_decode_side_by_side() -> None:
    """Four stages alike: with four sequences each goes round in the time of one, and the slowest stage sets the pace."""
    model = small_spec(num_layers=8, head=(Portion(1, 4),), head_flops_per_token=2)
    cost = cost_of(model, without(tiny(), layer_overhead_s=0.0), pipeline=4)
    assert cost.stage_layers == (2, 2, 2, 2)
    stage_s = cost.stage_s(3, tokens=1, pairs=11, kv_tokens=10, outputs=1)
    assert cost.token_s(1, 10) == pytest.approx(
        sum(cost.stage_s(stage, tokens=1, pairs=11, kv_tokens=10, outputs=1) for stage in range(4)), rel=1e-12
    )
    assert cost.token_s(4, 40) == pytest.approx(4 * stage_s, rel=1e-12)
    assert cost.token_s(8, 80) == pytest.approx(4 * cost.stage_s(3, tokens=2, pairs=22, kv_tokens=20, outputs=2), rel=1e-12)


def test_hops_are_paid_on_the_way_round() -> None:
    model = small_spec()
    fast, slow = (cost_of(model, hardware, pipeline=2) for hardware in (without(tiny()), tiny(num_devices=1)))
    hop_s = 1e-4 + 32 * 4 / 1e8
    assert slow.token_s(1, 10) - fast.token_s(1, 10) == pytest.approx(hop_s + 1e-4, rel=1e-9), (
        "forth with a state, back with a token"
    )


def test_uneven_stages_are_as_the_shape_says() -> None:
    model = small_spec()
    cost = cost_of(model, tiny(), pipeline=2, stage_layers=(3, 1))
    step = {"tokens": 2, "pairs": 30, "kv_tokens": 28}
    layer_s = layer_step_s(model, 1, tiny(), tokens=2, pairs=30, kv_tokens=28)
    assert cost.stage_s(0, **step) == pytest.approx(3 * layer_s)
    assert cost.stage_s(0, **step, outputs=2) == cost.stage_s(0, **step), "the head is on the last stage"
    assert cost.stage_s(1, **step, outputs=2) == pytest.approx(layer_s + head_step_s(model, 1, tiny(), outputs=2))


def test_slices_bring_a_long_prompt_through_a_pipeline_sooner() -> None:
    hardware = instance_type("g6.12xlarge")
    cost = cost_of(LLAMA_70B, hardware, pipeline=8)
    whole_s = sum(cost.stage_s(stage, tokens=2048, pairs=2048 * 1024.5, kv_tokens=0, outputs=1) for stage in range(8))
    assert cost.prompt_s(2048) < cost.first_token_s(2048) < whole_s / 3
    assert cost.first_token_s(2048) == pytest.approx(1.55, rel=0.1), "what TeraPipe's dynamic program finds with these rates"


def test_what_does_not_fit_says_by_how_much() -> None:
    reason = replica_cost(LLAMA_70B, Parallel(tensor=4), instance_type("g5.12xlarge"))
    assert isinstance(reason, str)
    assert "stage 0 needs" in reason and "A10G" in reason and "more than the 21.6 GB" in reason
    cut = replica_cost(LLAMA_70B, Parallel(tensor=3), instance_type("g5.12xlarge"))
    assert cut == misfit(LLAMA_70B, 1, 3)
    assert replica_cost(small_spec(), Parallel(pipeline=5), tiny()) == misfit(small_spec(), 5, 1)


def test_spotserves_smallest_gpt_20b_takes_twelve_t4() -> None:
    """Table 1 and section 5.1 of the paper: 12 with its migration planner, (P, M) = (3, 4)."""
    hardware = instance_type("g4dn.12xlarge", value_bytes=4)
    assert isinstance(replica_cost(GPT_20B, Parallel(pipeline=3, tensor=4, max_batch=4), hardware), ReplicaCost)
    assert isinstance(replica_cost(GPT_20B, Parallel(pipeline=1, tensor=4, max_batch=4), hardware), str)


def test_memory_is_weights_and_activations_and_the_rest_is_kv_to_the_last_token() -> None:
    model, shape = small_spec(), Parallel(pipeline=2, max_batch=8)
    fullest = stage_weight_bytes(model, shape, 0)
    assert fullest == 2 * 800 + 400
    token_bytes = 2 * 2 * 4 * 8 * 4
    for tokens in (1, 7):
        usable = fullest + activation_bytes(model, shape) + tokens * token_bytes
        memory = -(-usable * 10 // 9)
        assert USABLE_SHARE == 0.9
        exact = replica_cost(model, shape, tiny(memory_bytes=memory))
        assert isinstance(exact, ReplicaCost)
        assert (exact.kv_tokens, exact.max_batch) == (tokens, min(8, tokens)), "a sequence holds a token at least"
        less = replica_cost(model, shape, tiny(memory_bytes=memory - 2))
        assert isinstance(less, str) if tokens == 1 else isinstance(less, ReplicaCost) and less.kv_tokens == tokens - 1


@given(st.sampled_from([1, 2, 4, 8, 16, 64]), st.integers(1, 8), st.data())
def test_more_shards_never_hold_more_weights_per_device(tensor: int, pipeline: int, data: st.DataObject) -> None:
    model = named_model(data.draw(st.sampled_from(["llama-3-8b", "llama-3-70b", "mistral-7b"])))
    shapes = [Parallel(pipeline=pipeline, tensor=number) for number in (tensor, 2 * tensor)]
    fewer, more = (max(stage_weight_bytes(model, shape, stage) for stage in range(pipeline)) for shape in shapes)
    assert more <= fewer
    assert fewer >= model.layer_bytes * (model.num_layers // pipeline) / tensor
    assert held_bytes(model.layer, tensor, 0) * tensor >= model.layer_bytes


shapes = st.tuples(st.sampled_from([1, 2, 3, 4]), st.sampled_from([1, 2, 4, 8]))


@settings(deadline=None, max_examples=60)
@given(shapes, st.integers(1, 64), st.floats(1, 4000), st.floats(1, 2))
def test_longer_or_more_is_never_faster(shape: tuple[int, int], sequences: int, context: float, factor: float) -> None:
    cost = replica_cost(LLAMA_7B, Parallel(pipeline=shape[0], tensor=shape[1], max_batch=64), instance_type("p4d.24xlarge"))
    assume(isinstance(cost, ReplicaCost))
    assert isinstance(cost, ReplicaCost)
    token_s = cost.token_s(sequences, sequences * context)
    assert cost.token_s(sequences, sequences * context * factor) >= token_s * (1 - 1e-12)
    assert cost.token_s(sequences * factor, sequences * factor * context) >= token_s * (1 - 1e-12)
    assert cost.prompt_s(context * factor) >= cost.prompt_s(context) * (1 - 1e-9)
    assert cost.first_token_s(context) >= cost.prompt_s(context) * (1 - 1e-9)
    assert cost.first_token_s(context * factor) >= cost.first_token_s(context) * (1 - 2e-2), "one slice more may be a little better"


def test_it_is_what_queueing_and_search_ask_for() -> None:
    speed: ReplicaSpeed = cost_of(small_spec(), tiny())
    assert speed.max_batch == 32 and speed.kv_tokens > 0
    assert replica_cost(small_spec(), Parallel(), tiny()) is speed, "asked again, nothing is computed again"
