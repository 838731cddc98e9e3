"""How long a device computes: the smoothed roofline that calibration fits and the cost of a replica is made of.

A step computes and reads memory at once: it takes about the longer of the two, and a little more where they are near each other.
The p-norm of both says this with one constant; p = 3 fits 2,088 measured points per GPU (Vidur's profiles, arXiv 2405.05465) as
well as the sum, without bandwidths beyond the data sheet. Knows seconds, not what is computed.
"""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Seconds = TypeVar("Seconds", float, npt.NDArray[np.float64])

NORM = 3.0
"""The p of the norm: infinity is the plain roofline (Williams et al., CACM 2009), 1 a device that does one after the other."""


def roofline_s(compute_s: Seconds, memory_s: Seconds) -> Seconds:
    """Time of work that computes for `compute_s` and reads and writes memory for `memory_s`, both at once."""
    seconds: Seconds = (compute_s**NORM + memory_s**NORM) ** (1 / NORM)
    return seconds


@dataclass(frozen=True, slots=True)
class StepCost:
    """One decoder layer, or the head, on one shard: what a step of it takes, in pieces that are linear in what the step holds."""

    constant_s: float
    """Of any step: overhead, and the latency of what shards tell each other."""
    weights_s: float
    """Reading the weights of the shard."""
    token_s: float
    """Computing, per token, attention apart."""
    pair_s: float
    """Computing, per pair of a token and one that it attends to."""
    kv_token_s: float
    """Reading or writing the KV of one token."""
    token_link_s: float
    """What shards tell each other, per token."""

    def seconds(self, tokens: float, pairs: float = 0.0, kv_tokens: float = 0.0) -> float:
        """A step of so many new tokens, with so many pairs (`chunks.num_pairs`), that reads the KV of `kv_tokens` others."""
        compute_s = tokens * self.token_s + pairs * self.pair_s
        memory_s = self.weights_s + (tokens + kv_tokens) * self.kv_token_s
        return roofline_s(compute_s, memory_s) + self.constant_s + tokens * self.token_link_s
