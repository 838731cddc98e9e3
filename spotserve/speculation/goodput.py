"""How many tokens to draft now: as many as make tokens per second the most, by what was measured here and lately.

A step of r rows costs about c0 + c1 * r seconds; a draft of k tokens of which each is accepted with probability a brings
a + a^2 + ... + a^k tokens. Both laws are fitted to recent steps, older ones fading. A wrong choice costs time, never an answer,
so the rule may look at anything, clocks included. Pure arithmetic; knows no sequences.
"""

from dataclasses import dataclass

_FADING = 0.98
"""Weight that a past step keeps with each new one: a memory of about fifty steps."""
_PROBE_EVERY_STEPS = 64
"""Once in so many steps drafting is tried in full, and in the next step not at all: text and load change, and the cost of a row
cannot be seen while every step has the same number of rows."""


@dataclass(slots=True)
class _Line:
    """Least squares with fading weights: seconds = fixed_s + per_row_s * rows."""

    weight: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def add(self, x: float, y: float) -> None:
        """One measurement."""
        self.weight = self.weight * _FADING + 1.0
        self.x = self.x * _FADING + x
        self.y = self.y * _FADING + y
        self.xx = self.xx * _FADING + x * x
        self.xy = self.xy * _FADING + x * y

    @property
    def slope(self) -> float:
        """Seconds per row, at least 0; 0 while every step had the same number of rows."""
        spread = self.weight * self.xx - self.x * self.x
        return max(0.0, (self.weight * self.xy - self.x * self.y) / spread) if spread > 1e-9 * self.xx else 0.0

    def at(self, x: float) -> float:
        """Seconds for so many rows, by the line through the mean."""
        mean_x, mean_y = self.x / self.weight, self.y / self.weight
        return max(mean_y + self.slope * (x - mean_x), 1e-9)


class GoodputRule:
    """The rule of one engine: goodput decides the draft length (after SmartSpec)."""

    def __init__(self, *, max_tokens: int) -> None:
        assert max_tokens >= 1
        self._max_tokens = max_tokens
        self._cost = _Line()
        self._accepted = 1.0  # one accepted and one refused: no opinion yet
        self._tried = 2.0
        self._steps = 0

    @property
    def acceptance(self) -> float:
        """Chance of a draft token whose predecessors were accepted, lately."""
        return self._accepted / self._tried

    def observe_step(self, *, rows: int, step_s: float) -> None:
        """A step without prompts took `step_s` for `rows`, draft tokens included."""
        self._cost.add(rows, step_s)
        self._steps += 1

    def observe_draft(self, *, drafted: int, accepted: int) -> None:
        """A draft was verified: every accepted token was tried, and the first refused one."""
        assert 0 <= accepted <= drafted
        self._accepted = self._accepted * _FADING + accepted
        self._tried = self._tried * _FADING + min(drafted, accepted + 1)

    def draft_tokens(self, *, num_sequences: int) -> int:
        """Tokens to draft per sequence in the next step."""
        since_probe = self._steps % _PROBE_EVERY_STEPS
        if since_probe <= 1:
            return self._max_tokens if since_probe == 0 else 0
        return max(range(self._max_tokens + 1), key=lambda tokens: (self._goodput(tokens, num_sequences), -tokens))

    def _goodput(self, tokens: int, num_sequences: int) -> float:
        """Expected tokens per second and sequence."""
        gained = sum(self.acceptance**depth for depth in range(1, tokens + 1))
        return (1.0 + gained) / self._cost.at(num_sequences * (1 + tokens))
