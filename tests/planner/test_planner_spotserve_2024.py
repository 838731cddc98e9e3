"""The published rule: table 1 of the paper and what the artifact's solver chooses, from the published profiles; its branches from
small ones of our own."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from published_profiles import published_profile

from spotserve.core.errors import ConfigError
from spotserve.planner.profiles import LayerTime, Profile
from spotserve.planner.spotserve_2024 import PublishedChoice, choose, latency_ms

MIN_DEVICES = {"6.7B": 4, "20B": 12, "30B": 16}


def small_profile(incr: dict[tuple[int, int], float], *, padded_layers: int = 4, init: float = 10.0) -> Profile:
    """Four layers; a batch takes `incr` ms per token and layer, a prompt `init` per sequence."""
    batches = sorted({batch for _, batch in incr})
    return Profile(
        name="small",
        num_layers=4,
        padded_layers=padded_layers,
        hidden_size=8,
        max_tensor=max(tensor for tensor, _ in incr),
        fix_factor=1.0,
        init_hop_ms=2.0,
        incr_hop_ms=0.5,
        embed_ms=tuple(0.25 for _ in batches),
        layer_ms={(tensor, batch): LayerTime(init * batch, time) for (tensor, batch), time in incr.items()},
    )


def on(profile: Profile, num_devices: int, **other) -> PublishedChoice | None:
    wanted = {"required_rps": 0.0, "min_devices": 1, "max_batch": max(profile.batches), "output_tokens": 10, **other}
    return choose(profile, num_instances=num_devices, devices_per_instance=1, **wanted)


# --------------------------------------------------------------------------- as published


@pytest.mark.parametrize(
    ("model", "pipeline", "tensor", "expected_ms"), [("6.7B", 1, 4, 5447.3), ("20B", 3, 4, 14372.8), ("30B", 2, 8, 17539.9)]
)
def test_table_1_of_the_paper_to_the_tenth_of_a_millisecond(model: str, pipeline: int, tensor: int, expected_ms: float) -> None:
    assert round(latency_ms(published_profile(model), pipeline=pipeline, tensor=tensor), 1) == expected_ms


ROWS = [
    ("20B", rate, instances, shape, batch, latency_s, throughput_rps)
    for rate in (0.4, 0.35)
    for counts, shape, batch, latency_s, throughput_rps in [
        ((3,), (1, 3, 4), 4, 14.46, 0.277),
        ((4, 5), (1, 2, 8), 4, 12.96, 0.309),
        ((6, 7), (2, 3, 4), 4, 14.46, 0.553),
        ((8, 9, 10, 11), (2, 2, 8), 4, 12.96, 0.617),
        ((12,), (3, 2, 8), 2, 12.12, 0.495),
    ]
    for instances in counts
]
ROWS += [("20B", 0.8, instances, (3, 3, 4), 4, 14.46, 0.830) for instances in (9, 10, 11)]
ROWS += [("20B", 0.8, 12, (3, 2, 8), 4, 12.96, 0.926)]
ROWS += [
    ("30B", 0.2, instances, shape, 4, latency_s, throughput_rps)
    for counts, shape, latency_s, throughput_rps in [
        ((4, 5), (1, 2, 8), 17.75, 0.225),
        ((6, 7), (1, 3, 8), 17.50, 0.229),
        ((8, 9, 10, 11), (1, 4, 8), 17.38, 0.230),
        ((12,), (1, 6, 8), 17.29, 0.231),
    ]
    for instances in counts
]
ROWS += [("6.7B", 2.0, instances, (instances, 1, 4), 4, 5.29, None) for instances in (3, 4)]
ROWS += [("6.7B", 2.0, instances, (instances, 1, 4), 2, 4.89, None) for instances in (5, 6, 7, 8, 9)]
ROWS += [("6.7B", 2.0, instances, (5, 2, 4), 2, 4.73, None) for instances in (10, 11)]
ROWS += [("6.7B", 2.0, 12, (6, 2, 4), 2, 4.73, None)]
"""What the artifact's own solver chooses for every number of machines of four T4 (facts of its code and profiles)."""


@pytest.mark.parametrize(("model", "rate", "instances", "shape", "batch", "latency_s", "throughput_rps"), ROWS)
def test_it_chooses_what_the_artifact_chooses(model, rate, instances, shape, batch, latency_s, throughput_rps) -> None:
    choice = choose(
        published_profile(model),
        num_instances=instances,
        devices_per_instance=4,
        required_rps=rate,
        min_devices=MIN_DEVICES[model],
    )
    assert choice is not None
    assert (choice.data, choice.pipeline, choice.tensor) == shape and choice.batch == batch
    assert choice.latency_s == pytest.approx(latency_s, abs=0.0051)
    assert throughput_rps is None or choice.throughput_rps == pytest.approx(throughput_rps, abs=0.00051)


@pytest.mark.parametrize(("pipeline", "tensor", "published_s", "undivided_s"), [(2, 8, 12.96, 15.10), (3, 4, 14.46, 17.26)])
def test_prompts_are_dear_when_they_are_not_divided_twice(pipeline, tensor, published_s, undivided_s) -> None:
    def best_s(divide_prefill: bool) -> float:
        milliseconds = (
            latency_ms(
                published_profile("20B"),
                pipeline=pipeline,
                tensor=tensor,
                batch=4,
                prompt_parts=parts,
                divide_prefill=divide_prefill,
            )
            for parts in (1, 2, 4)
        )
        return round(min(milliseconds) / 1000, 2)

    assert (best_s(True), best_s(False)) == (published_s, undivided_s)


# --------------------------------------------------------------------------- branch by branch


def test_the_formula_term_by_term() -> None:
    profile = small_profile({(1, 1): 1.0, (1, 2): 1.5})
    prompt = 10 * 2 * (2 + 1) / 2 + 2.0 / 2
    token = 1.5 * 2 * 2 + 0.5
    expected = prompt + 10 * token + 2 * 0.25
    assert latency_ms(profile, pipeline=2, tensor=1, batch=2, prompt_parts=2, output_tokens=10) == pytest.approx(expected)
    parts = 10 * 2 * 2 * 2 + 2.0 + 10 * (1.0 * 2 * (2 + 1) + 0.5 / 2) + 2 * 0.25
    assert latency_ms(profile, pipeline=2, tensor=1, batch=2, token_parts=2, output_tokens=10) == pytest.approx(parts)
    undivided = 10 * 2 * (2 + 1) + 2.0 + 10 * token + 2 * 0.25
    assert latency_ms(
        profile, pipeline=2, tensor=1, batch=2, prompt_parts=2, output_tokens=10, divide_prefill=False
    ) == pytest.approx(undivided)


def test_the_shortest_of_what_is_enough_else_the_most() -> None:
    profile = small_profile({(1, 1): 10.0, (1, 2): 12.0})
    slow = on(profile, 4)
    assert slow is not None and slow.batch == 1  # shorter than a batch of two, and nothing is required
    enough = on(profile, 4, required_rps=slow.throughput_rps * 1.2)
    assert enough is not None and enough.batch == 2
    too_much = on(profile, 4, required_rps=1e9)
    assert too_much is not None and too_much.throughput_rps == max(each.throughput_rps for each in (slow, enough, too_much))


def test_stages_divide_the_padded_layers_and_replicas_take_what_fits() -> None:
    profile = small_profile({(1, 1): 1.0}, padded_layers=6)
    choice = on(profile, 5, min_devices=3)
    assert choice is not None and (choice.data, choice.pipeline, choice.tensor) == (1, 3, 1)
    assert on(profile, 5, min_devices=4) is None  # neither 4 nor 5 divides 6
    assert on(profile, 2, min_devices=3) is None
    assert on(profile, 0) is None


def test_of_equally_good_shapes_the_first_wins() -> None:
    """A smaller tensor degree comes first: here doubling it changes nothing."""
    profile = small_profile({(1, 1): 1.0, (2, 1): 1.0})
    choice = on(profile, 2, min_devices=1)
    assert choice is not None and (choice.data, choice.pipeline, choice.tensor) == (2, 1, 1)


@pytest.mark.parametrize("wrong", [{"max_tensor": 4}, {"max_tensor": 0}, {"max_batch": 3}, {"max_batch": 4}])
def test_what_was_not_measured_is_refused(wrong) -> None:
    profile = small_profile({(1, 1): 1.0, (1, 2): 1.0, (2, 1): 1.0, (2, 2): 1.0})
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        on(profile, 4, **wrong)


times = st.floats(0.1, 10.0)
profiles = st.builds(
    lambda values, padded: small_profile(
        dict(zip(itertools.product((1, 2), (1, 2, 4)), values, strict=True)), padded_layers=padded
    ),
    st.lists(times, min_size=6, max_size=6),
    st.sampled_from([4, 6, 12]),
)


@settings(max_examples=60)
@given(profiles, st.integers(1, 13), st.integers(1, 4), st.floats(0, 100))
def test_no_shape_that_fits_is_better(profile: Profile, num_devices: int, min_devices: int, rate: float) -> None:
    choice = on(profile, num_devices, min_devices=min_devices, required_rps=rate)
    others = []
    for pipeline, tensor, batch in itertools.product(range(1, 14), (1, 2), (1, 2, 4)):
        if not min_devices <= pipeline * tensor <= num_devices or profile.padded_layers % pipeline:
            continue
        for prompt_parts, token_parts in itertools.product((each for each in (1, 2, 4) if each <= batch), repeat=2):
            milliseconds = latency_ms(
                profile,
                pipeline=pipeline,
                tensor=tensor,
                batch=batch,
                prompt_parts=prompt_parts,
                token_parts=token_parts,
                output_tokens=10,
            )
            others.append((milliseconds / 1000, num_devices // (pipeline * tensor) * batch / milliseconds * 1000))
    if choice is None:
        assert not others
        return
    assert (choice.latency_s, choice.throughput_rps) in others
    enough = [latency for latency, throughput in others if throughput >= rate]
    if enough:
        assert choice.throughput_rps >= rate and choice.latency_s == min(enough)
    else:
        assert choice.throughput_rps == max(throughput for _, throughput in others)
