"""The times of one kind of replica, looked up: a simulation asks for them hundreds of thousands of times.

`token_s` is kept by number of sequences as a line through a few contexts: times are smooth in the context, and with these knots
lines are within 0.1 % of them (tested). Prompts are kept as they are asked for.
"""

from functools import lru_cache

from spotserve.planner.speed import ReplicaSpeed

KNOTS = 32
"""Pieces of the line, from no context to a full KV cache."""


class TokenTimes:
    """Times of one `ReplicaSpeed`."""

    def __init__(self, speed: ReplicaSpeed) -> None:
        self.speed = speed
        self._piece_tokens = max(1.0, speed.kv_tokens / KNOTS)
        self._lines: dict[int, list[float]] = {}
        self._prompts_s: dict[int, tuple[float, float]] = {}

    def token_s(self, sequences: int, context_tokens: float) -> float:
        """See `ReplicaSpeed.token_s`."""
        line = self._lines.get(sequences)
        if line is None:
            piece = self._piece_tokens
            line = self._lines[sequences] = [self.speed.token_s(sequences, number * piece) for number in range(KNOTS + 2)]
        place = context_tokens / self._piece_tokens
        number = min(int(place), KNOTS)
        left = line[number]
        return left + (line[number + 1] - left) * (place - number)

    def prompt_s(self, tokens: int) -> tuple[float, float]:
        """`ReplicaSpeed.prompt_s` and `first_token_s` of a prompt of so many tokens."""
        times_s = self._prompts_s.get(tokens)
        if times_s is None:
            times_s = self._prompts_s[tokens] = (self.speed.prompt_s(tokens), self.speed.first_token_s(tokens))
        return times_s


@lru_cache(maxsize=1024)
def token_times(speed: ReplicaSpeed) -> TokenTimes:
    """The times of this speed: replicas that are alike share them."""
    return TokenTimes(speed)
