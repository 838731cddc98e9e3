"""Trust, but measure: speculation that does not deliver is switched off for a while, longer each time.

What a step takes is predicted, and predictions can be wrong in ways that a law of four coefficients cannot say. So committed tokens
per second of the steps that speculate are held against what plain steps would have made in the same time. Knows no sequences.
"""

import math
from typing import Final

_WINDOW_STEPS: Final = 32
"""Steps that are judged together."""
_LEAST_SHARE: Final = 0.98
"""Of the plain goodput that speculating steps have to reach."""
_FIRST_BACK_OFF_STEPS: Final = 64
_LONGEST_BACK_OFF_STEPS: Final = 4096


class RealisedGoodput:
    """The guard of one replica."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._plain_tokens = 0.0
        self._steps = self._sequence_steps = 0
        self._back_off_steps = _FIRST_BACK_OFF_STEPS
        self._off_steps = 0

    @property
    def is_off(self) -> bool:
        """Whether nothing should be verified now."""
        return self._off_steps > 0

    def observe(self, *, tokens: int, sequences: int, step_s: float, plain_step_s: float, speculated: bool) -> None:
        """A step committed so many tokens; a plain one of as many sequences would have taken `plain_step_s`."""
        if self._off_steps:
            self._off_steps -= 1
        if not speculated:
            return
        self._tokens += tokens
        self._plain_tokens += sequences * step_s / plain_step_s
        self._sequence_steps += sequences
        self._steps += 1
        if self._steps < _WINDOW_STEPS:
            return
        chance = math.sqrt(max(0.0, self._tokens - self._sequence_steps))  # accepted tokens vary about so much by themselves
        if self._tokens + chance < _LEAST_SHARE * self._plain_tokens:
            self._off_steps = self._back_off_steps
            self._back_off_steps = min(2 * self._back_off_steps, _LONGEST_BACK_OFF_STEPS)
        else:
            self._back_off_steps = max(_FIRST_BACK_OFF_STEPS, self._back_off_steps // 2)
        self._tokens = self._plain_tokens = 0.0
        self._steps = self._sequence_steps = 0
