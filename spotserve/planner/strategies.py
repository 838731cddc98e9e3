"""What each layer does when not all of them fit the devices: stay, stay in 8 bits, or come from the host for every step.

Too few devices remain, but the model should go on serving, slowly (KARMA, SC'20, arXiv 2008.11421, turned from training to
serving). While one layer computes the next one is copied into a second buffer, so a step takes
    max(time of all copies, time of all computing),
which is no sum over layers. Galvatron's program (VLDB'23, arXiv 2211.13878: layers one by one, memory as the knapsack's axis)
therefore gets a second axis, what is copied per step: for every amount of memory and of copying the least time of computing.
Then the best of all amounts of copying is the optimum, exactly.

8 bits are other weights and give other tokens: nobody gets them who did not allow them.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from math import ceil, floor, inf

import numpy as np
import numpy.typing as npt

from spotserve.core.cut import held_bytes
from spotserve.core.hardware import DeviceType, InstanceType
from spotserve.core.model import ModelSpec, Portion

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Option:
    """One way to treat one layer. Memory and copies are in whole units, of whatever size."""

    compute_s: float
    """How long it keeps the device busy in every step."""
    memory_units: int
    """What it takes of the device's memory."""
    copied_units: int = 0
    """What is copied from the host for it in every step, and waits there."""

    def __post_init__(self) -> None:
        assert self.compute_s >= 0 and self.memory_units >= 0 and self.copied_units >= 0


@dataclass(frozen=True, slots=True)
class Chosen:
    """Which option each layer takes."""

    options: tuple[int, ...]
    step_s: float
    copied_units: int


def best_options(
    layers: Sequence[Sequence[Option]],
    *,
    memory_units: int,
    buffer_units: int = 0,
    host_units: int,
    copy_unit_s: float,
) -> Chosen | None:
    """The choice with the shortest step; None when no choice fits.

    Args:
        layers: the options of each layer, the same number for all.
        memory_units: what the device has for them.
        buffer_units: what of it is needed for copies to arrive in, if anything is copied.
        host_units: what the host holds at most.
        copy_unit_s: time to copy one unit.

    Of equally short steps the one with the fewest copies wins. O(layers x options x memory x copies), vectorised.
    """
    most_copied = min(host_units, sum(max(option.copied_units for option in options) for options in layers))
    if buffer_units > memory_units:
        most_copied = 0
    memory_units = min(memory_units, buffer_units + sum(max(option.memory_units for option in options) for options in layers))
    compute_s, taken = _least_compute(layers, memory_units, most_copied)
    steps_s = np.full(most_copied + 1, inf)
    steps_s[0] = compute_s[memory_units, 0]
    if most_copied:
        copying = np.arange(1, most_copied + 1) * copy_unit_s
        steps_s[1:] = np.maximum(copying, compute_s[memory_units - buffer_units, 1:])
    copied = int(steps_s.argmin())
    if steps_s[copied] == inf:
        return None
    memory = memory_units - (buffer_units if copied else 0)
    return Chosen(_traced(layers, taken, memory, copied), float(steps_s[copied]), copied)


def _least_compute(
    layers: Sequence[Sequence[Option]], memory_units: int, most_copied: int
) -> tuple[Floats, list[npt.NDArray[np.int8]]]:
    """[memory at most, copied exactly] -> least compute time; and per layer which option gave it."""
    least = np.full((memory_units + 1, most_copied + 1), inf)
    least[:, 0] = 0.0
    taken, reach = [], 0
    for options in layers:
        after = np.full_like(least, inf)
        which = np.zeros(least.shape, dtype=np.int8)
        before, reach = reach, min(most_copied, reach + max(option.copied_units for option in options))
        for index, option in enumerate(options):
            memory, copied = option.memory_units, option.copied_units
            columns = min(before, most_copied - copied) + 1  # what the layers so far copy at most
            if memory > memory_units or columns < 1:
                continue
            through = least[: memory_units + 1 - memory, :columns] + option.compute_s
            there = after[memory:, copied : copied + columns]
            better = through < there
            np.copyto(there, through, where=better)
            np.copyto(which[memory:, copied : copied + columns], np.int8(index), where=better)
        least = after
        taken.append(which)
    return least, taken


def _traced(layers: Sequence[Sequence[Option]], taken: Sequence[npt.NDArray[np.int8]], memory: int, copied: int) -> tuple[int, ...]:
    chosen = []
    for options, which in zip(reversed(layers), reversed(taken), strict=True):
        chosen.append(int(which[memory, copied]))
        memory -= options[chosen[-1]].memory_units
        copied -= options[chosen[-1]].copied_units
    return tuple(reversed(chosen))


class Strategy(Enum):
    """What happens to the weights of a layer."""

    RESIDENT = "resident"
    INT8 = "int8"
    """Resident in 8 bits."""
    OFFLOADED = "offloaded"
    """In the memory of the host, copied for every step."""


@dataclass(frozen=True, slots=True)
class Degraded:
    """How a model that does not fit is served all the same."""

    strategies: tuple[Strategy, ...]
    """Of every decoder layer, and of the head as the last one."""
    step_s: float
    """Between two tokens of every sequence, a step's communication apart."""
    offloaded_bytes: int
    """What the host holds, for all its devices together, and copies in every step."""


def degrade(
    model: ModelSpec,
    instance_type: InstanceType,
    *,
    tensor: int,
    weight_budget_bytes: int,
    sequences: int = 1,
    allowed: Collection[Strategy] = (Strategy.RESIDENT, Strategy.OFFLOADED),
    memory_bins: int = 256,
) -> Degraded | None:
    """The fastest way to serve `model` on one stage of `tensor` devices of one machine; None when there is none.

    Args:
        model: its embedding stays resident, since a step reads few rows of it.
        instance_type: times are the larger of streaming a layer from the device's memory and computing it.
        tensor: devices, each with its own way to the host.
        weight_budget_bytes: what weights may take of each device, buffers for copies included.
        sequences: that a step advances.
        allowed: RESIDENT is always.
        memory_bins: into how many units the budget is divided, about; sizes are rounded up to whole ones.
    """
    assert weight_budget_bytes <= instance_type.device.memory_bytes, "a budget beyond the device"
    budget_bytes = weight_budget_bytes - held_bytes(model.embedding, tensor, 0)
    if budget_bytes <= 0:
        return None
    kinds = [kind for kind in Strategy if kind is Strategy.RESIDENT or kind in allowed]
    decoder = _Sizes.of(model, model.layer, model.layer_flops_per_token * sequences, tensor)
    head = _Sizes.of(model, model.head, model.head_flops_per_token * sequences, tensor)
    sizes = [*[decoder] * model.num_layers, head]
    unit = _unit(decoder.small_bytes, budget_bytes, sum(size.num_bytes for size in sizes), memory_bins)
    of_decoder, of_head = ([size.option(kind, instance_type.device, unit) for kind in kinds] for size in (decoder, head))
    best = best_options(
        [*[of_decoder] * model.num_layers, of_head],
        memory_units=floor(budget_bytes / unit),
        buffer_units=2 * ceil(max(decoder.num_bytes, head.num_bytes) / unit),
        host_units=floor(instance_type.host_memory_bytes / (tensor * unit)),
        copy_unit_s=float(unit / Fraction(instance_type.host_link.bytes_per_s)),
    )
    if best is None:
        return None
    strategies = tuple(kinds[option] for option in best.options)
    offloaded = (size.num_bytes for size, strategy in zip(sizes, strategies, strict=True) if strategy is Strategy.OFFLOADED)
    return Degraded(strategies, best.step_s, sum(offloaded) * tensor)


@dataclass(frozen=True, slots=True)
class _Sizes:
    """One shard of one layer."""

    num_bytes: int
    small_bytes: int
    """In 8 bits: weights have as many bytes each as the elements of the KV cache."""
    flops: float

    @classmethod
    def of(cls, model: ModelSpec, portions: tuple[Portion, ...], flops: int, tensor: int) -> "_Sizes":
        """A layer of these portions and operations, cut into `tensor` shards."""
        num_bytes = held_bytes(portions, tensor, 0)
        return cls(num_bytes, -(-num_bytes // model.value_bytes), flops / tensor)

    def option(self, kind: Strategy, device: DeviceType, unit: Fraction) -> Option:
        """The layer when it is treated as `kind` says."""
        num_bytes = self.small_bytes if kind is Strategy.INT8 else self.num_bytes
        compute_s = device.layer_overhead_s + max(num_bytes / device.memory_bytes_per_s, self.flops / device.flops_per_s)
        units = ceil(num_bytes / unit)
        return Option(compute_s, 0, units) if kind is Strategy.OFFLOADED else Option(compute_s, units)


def _unit(small_bytes: int, budget_bytes: int, weight_bytes: int, bins: int) -> Fraction:
    """Bytes of a unit. It divides the smallest form of a layer, so that rounding up costs next to nothing.

    Neither the budget is many more than `bins` units nor are all weights many more than twice that.
    """
    most = max(1, small_bytes)
    return Fraction(most, max(1, min(bins * most // budget_bytes, 2 * bins * most // max(1, weight_bytes))))
