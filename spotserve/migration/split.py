"""How much of a sequence's KV is computed again where it goes, while the rest arrives: two ways to one cache, used at once.

KV of a token depends on the tokens before it alone. So the first part of a prefix can be computed at the destination without the
last part, which is sent meanwhile; never the other way round. Without waiting and deadline the best share to compute is
t_net / (t_rec + t_net), when both are done at once (the idea of KARMA, SC'20, arXiv 2008.11421, on the serving side).

Pure arithmetic. Does not know sequences, destinations or verdicts.
"""

from dataclasses import dataclass
from math import ceil, floor


@dataclass(frozen=True, slots=True)
class Split:
    """What becomes of a prefix: the first `recompute_tokens` are computed again, the last `move_tokens` are sent."""

    recompute_tokens: int
    move_tokens: int
    seconds: float
    """Until both are there."""


def split_s(recompute_tokens: int, move_tokens: int, *, recompute_token_s: float, move_token_s: float, wait_s: float) -> float:
    """Until a prefix that is divided like this is there; arguments as those of `best_split`."""
    return max(wait_s + recompute_tokens * recompute_token_s, move_tokens * move_token_s)


def best_split(
    tokens: int, *, recompute_token_s: float, move_token_s: float, wait_s: float = 0.0, move_within_s: float = float("inf")
) -> Split:
    """The division of `tokens` tokens under which the prefix is there first; of equally good ones that which sends more.

    The time computing takes grows with the tokens that are computed, sending takes less: the longer of both is least where they
    cross, or next to it in whole tokens.

    Args:
        tokens: of the prefix whose KV is held.
        recompute_token_s: to compute one of them at the destination.
        move_token_s: to send the KV of one.
        wait_s: until the destination begins to compute.
        move_within_s: sending has to be done by then; negative: nothing can be sent.
    """
    assert tokens >= 0 and min(recompute_token_s, move_token_s) > 0 and wait_s >= 0
    movable = min(float(tokens), max(0.0, move_within_s) / move_token_s)
    least = tokens - _whole_within(movable, move_token_s, move_within_s)
    crossing = (tokens * move_token_s - wait_s) / (recompute_token_s + move_token_s)
    candidates = {min(tokens, max(least, each)) for each in (floor(crossing), ceil(crossing))}

    def seconds(recompute_tokens: int) -> float:
        return split_s(
            recompute_tokens,
            tokens - recompute_tokens,
            recompute_token_s=recompute_token_s,
            move_token_s=move_token_s,
            wait_s=wait_s,
        )

    best = min(sorted(candidates), key=seconds)
    return Split(best, tokens - best, seconds(best))


def _whole_within(movable: float, move_token_s: float, move_within_s: float) -> int:
    """Whole tokens that can be sent in time, whatever the rounding of the division."""
    whole = floor(movable)
    return whole - 1 if whole > 0 and whole * move_token_s > move_within_s else whole
