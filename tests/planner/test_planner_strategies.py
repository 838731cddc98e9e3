"""Layers that stay, shrink or come from the host: the program against trying everything, and the degraded mode's figures."""

import itertools

import numpy as np
import pytest
from model_specs import small_spec

from spotserve.core.hardware import DeviceType, InstanceType, Link
from spotserve.core.model import ModelSpec, Portion
from spotserve.planner.strategies import Degraded, Option, Strategy, best_options, degrade


def everything_tried(
    layers: list[list[Option]], memory_units: int, buffer_units: int, host_units: int, copy_unit_s: float
) -> float | None:
    """The shortest step of all choices."""
    picks = np.array(list(itertools.product(*[range(len(options)) for options in layers])))
    rows = np.arange(len(layers))

    def total(field: str) -> np.ndarray:
        return np.array([[getattr(option, field) for option in options] for options in layers])[rows, picks].sum(axis=1)

    copied = total("copied_units")
    fits = (total("memory_units") + np.where(copied > 0, buffer_units, 0) <= memory_units) & (copied <= host_units)
    steps_s = np.maximum(copied * copy_unit_s, total("compute_s"))[fits]
    return float(steps_s.min()) if len(steps_s) else None


def test_the_program_finds_what_trying_everything_finds_in_200_random_tables() -> None:
    random = np.random.default_rng(7)
    found_none = with_copies = 0
    for _ in range(200):
        num_layers, num_options = int(random.integers(1, 9)), int(random.integers(1, 5))
        layers = [
            [
                Option(
                    float(random.integers(0, 30)), int(random.integers(0, 9)), int(random.integers(0, 7) * (random.random() < 0.5))
                )
                for _ in range(num_options)
            ]
            for _ in range(num_layers)
        ]
        limits = int(random.integers(0, 5 * num_layers)), int(random.integers(0, 5)), int(random.integers(0, 4 * num_layers))
        copy_unit_s = float(random.integers(0, 9))
        best_s = everything_tried(layers, *limits, copy_unit_s)
        found = best_options(layers, memory_units=limits[0], buffer_units=limits[1], host_units=limits[2], copy_unit_s=copy_unit_s)
        assert (found.step_s if found else None) == best_s
        if found is None:
            found_none += 1
            continue
        alone = [[options[index]] for options, index in zip(layers, found.options, strict=True)]
        assert everything_tried(alone, *limits, copy_unit_s) == best_s, "the choice is what it says"
        with_copies += found.copied_units > 0
    assert found_none > 10
    assert with_copies > 30


def machine(
    name: str, *, memory_mib: int, bytes_per_s: float, flops_per_s: float, host_bytes_per_s: float, host_memory_gib: int = 192
) -> InstanceType:
    device = DeviceType(
        name=name, memory_bytes=memory_mib << 20, flops_per_s=flops_per_s, memory_bytes_per_s=bytes_per_s, layer_overhead_s=0.0
    )
    return InstanceType(
        name=f"4x{name}",
        device=device,
        num_devices=4,
        device_link=Link(1e-5, 5e9),
        network=Link(5e-5, 5e9),
        host_memory_bytes=host_memory_gib << 30,
        host_link=Link(1e-5, host_bytes_per_s),
    )


A10G = machine("A10G", memory_mib=22_888, bytes_per_s=0.78 * 600e9, flops_per_s=40e12, host_bytes_per_s=20e9)
T4 = machine("T4", memory_mib=16_384, bytes_per_s=0.75 * 320e9, flops_per_s=26e12, host_bytes_per_s=10e9)

LLAMA_70B = small_spec(
    name="llama-2-70b",
    num_layers=80,
    hidden_size=8192,
    num_heads=64,
    num_kv_heads=8,
    head_size=128,
    vocabulary_size=32_000,
    layer=(Portion(8, 2 * 855_638_016), Portion(1, 4 * 8192)),
    embedding=(Portion(32_000, 2 * 8192 * 32_000),),
    head=(Portion(32_000, 2 * 8192 * 32_000), Portion(1, 2 * 8192)),
    value_bytes=2,
    layer_flops_per_token=2 * 855_638_016,
    head_flops_per_token=2 * 8192 * 32_000,
)


def degraded(model: ModelSpec, kind: InstanceType, *, usable: float = 0.875, **different: object) -> Degraded | None:
    budget = int(kind.device.memory_bytes * usable)
    return degrade(model, kind, tensor=4, weight_budget_bytes=budget, **different)  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "usable", "step_s"), [(A10G, 0.85, 0.73), (T4, 0.85, 2.06)])
def test_one_machine_keeps_70b_alive_at_the_published_figures(kind: InstanceType, usable: float, step_s: float) -> None:
    """By hand: (138 GB - what stays) / 4 devices / the way from the host; 80 GB stay on A10G, 56 GB on T4."""
    found = degraded(LLAMA_70B, kind, usable=usable)
    assert found is not None
    assert found.step_s == pytest.approx(step_s, rel=0.05)
    link = kind.host_link.bytes_per_s * 4
    assert found.step_s == pytest.approx(found.offloaded_bytes / link, rel=0.02)
    assert found.offloaded_bytes <= kind.host_memory_bytes


def test_the_host_must_hold_what_leaves_the_devices() -> None:
    small_host = machine("T4", memory_mib=16_384, bytes_per_s=240e9, flops_per_s=26e12, host_bytes_per_s=10e9, host_memory_gib=64)
    assert degraded(LLAMA_70B, small_host) is None
    assert degraded(LLAMA_70B, T4) is not None


def test_8_bits_come_only_where_they_are_allowed_and_spare_the_copies() -> None:
    every = degraded(LLAMA_70B, A10G, allowed=tuple(Strategy))
    plain = degraded(LLAMA_70B, A10G)
    assert plain is not None
    assert every is not None
    assert Strategy.INT8 not in plain.strategies
    assert every.offloaded_bytes == 0
    assert every.step_s < 0.2 * plain.step_s
    on_t4 = degraded(LLAMA_70B, T4, allowed=tuple(Strategy))
    assert on_t4 is not None
    assert on_t4.step_s < 0.36 * 2.06, "12 GB of 69 GB in 8 bits do not fit: 29 GB in 16 bits are copied, of 82 GB"


def test_a_model_that_fits_stays_where_it_is() -> None:
    found = degraded(small_spec(), T4)
    assert found is not None
    assert set(found.strategies) == {Strategy.RESIDENT}
    assert found.offloaded_bytes == 0


def test_no_room_for_two_layers_means_no_copies() -> None:
    spec = small_spec(embedding=(Portion(4, 400),), head=(Portion(4, 400),))
    four_layers_and_the_head = 4 * 200 + 100 + 100
    fits = degrade(spec, T4, tensor=4, weight_budget_bytes=four_layers_and_the_head)
    assert fits is not None
    assert set(fits.strategies) == {Strategy.RESIDENT}
    for budget in (four_layers_and_the_head - 1, 2 * 200 + 100 - 1, 1):
        found = degrade(spec, T4, tensor=4, weight_budget_bytes=budget)
        assert (found is None) == (budget < 2 * 200 + 100), "two buffers and the embedding"


@pytest.mark.parametrize("sequences", [1, 64])
def test_more_memory_is_never_slower(sequences: int) -> None:
    steps_s = []
    for usable in (0.3, 0.5, 0.7, 0.9):
        found = degraded(LLAMA_70B, A10G, usable=usable, sequences=sequences)
        assert found is not None
        steps_s.append(found.step_s)
    assert steps_s == sorted(steps_s, reverse=True)
