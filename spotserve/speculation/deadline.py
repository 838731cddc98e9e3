"""What tokens are worth when the machine goes at a known time: most, where they decide whether a sequence still ends in time.

A sequence that ends in time at the plain pace needs no help, and one that no draft could bring there will move or be resumed
whatever happens; rows go to those in between first. The objective turns from tokens per second to sequences that finish. Pure
arithmetic.
"""

from collections.abc import Sequence
from typing import Final

IN_TIME: Final = 0.25
"""Worth of a token of a sequence that ends in time without help."""
HOPELESS: Final = 0.125
"""Of one that cannot end in time."""
URGENT: Final = 1.0
"""Of one that ends in time if drafts are accepted."""


def worths_before(remaining_tokens: Sequence[int], *, step_s: float, left_s: float, max_depth: int) -> list[float]:
    """What a token of each sequence is worth.

    Args:
        remaining_tokens: per sequence, output tokens that may still come.
        step_s: of a plain step.
        left_s: until the machine goes.
        max_depth: of drafts: a step commits one token more at most.
    """
    worths = []
    for remaining in remaining_tokens:
        needed = remaining * step_s  # at the plain pace
        if needed <= left_s:
            worths.append(IN_TIME)
        elif needed <= left_s * (1 + max_depth):
            worths.append(URGENT)
        else:
            worths.append(HOPELESS)
    return worths
