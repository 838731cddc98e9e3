"""Gumbel noise as a pure function of (seed, output position, token id).

SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014) used as a counter-based generator: the
row key is a hash of seed and position, the token id is the counter. Integer arithmetic wraps alike everywhere, so every machine
draws the same bits; nothing is consumed, so nothing can get out of step. Knows neither requests nor logits.
"""

from collections.abc import Sequence

import torch

from spotserve.engine.device import on_device

_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB
_MASK = 2**64 - 1
_UNIFORM_BITS = 52
"""With 52 bits both ends of (k + 1/2) / 2^52 are exact doubles inside (0, 1), so that no logarithm is infinite."""


def _signed(value: int) -> int:
    """The 64 bits as torch's int64 writes them."""
    value &= _MASK
    return value - 2**64 if value >= 2**63 else value


def _finalize(value: int) -> int:
    value &= _MASK
    value = ((value ^ (value >> 30)) * _MULTIPLIER_1) & _MASK
    value = ((value ^ (value >> 27)) * _MULTIPLIER_2) & _MASK
    return value ^ (value >> 31)


def row_key(seed: int, position: int) -> int:
    """Key of one output position of one request, 64 bits."""
    return _finalize(_finalize(seed + _GOLDEN) + (position + 1) * _GOLDEN)


class KeyedGumbel:
    """Noise over a vocabulary."""

    def __init__(self, *, vocabulary_size: int, device: torch.device) -> None:
        self._counters = torch.arange(1, vocabulary_size + 1, device=device).mul_(_signed(_GOLDEN))  # [vocabulary]

    def draw(self, *, seeds: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """Standard Gumbel noise, float64 [rows, vocabulary]; row i belongs to `seeds[i]` at output position `positions[i]`."""
        keys = [_signed(row_key(seed, position)) for seed, position in zip(seeds, positions, strict=True)]
        bits = on_device(keys, self._counters.device)[:, None] + self._counters  # [rows, vocabulary]
        bits = _xor_shifted(bits, 30).mul_(_signed(_MULTIPLIER_1))
        bits = _xor_shifted(bits, 27).mul_(_signed(_MULTIPLIER_2))
        bits = _xor_shifted(bits, 31)
        uniform = (bits >> (64 - _UNIFORM_BITS)).bitwise_and_(2**_UNIFORM_BITS - 1).to(torch.float64)
        uniform.add_(0.5).mul_(2.0**-_UNIFORM_BITS)
        return uniform.log_().neg_().log_().neg_()


def _xor_shifted(bits: torch.Tensor, shift: int) -> torch.Tensor:
    """bits ^ (bits >>> shift), in place; int64 has only the arithmetic shift, so the sign's copies are masked off."""
    return bits.bitwise_xor_((bits >> shift).bitwise_and_(2 ** (64 - shift) - 1))
