"""Into how many slices a prompt is cut for a pipeline, where reading weights hides behind computing.

`chunks` plans with a slice cost that is linear, as a worker fits it to its own steps. A roofline is not: up to its knee a longer
slice is free. With compute x over all slices and weights w per slice, m equal slices take (m + P - 1) * |(x / m, w)|_p, which is
smallest at m = ((P - 1) * (x / w)^p)^(1 / (p + 1)); p = 1 is the rule of `chunks`. Overheads move it a little: the
neighbours are tried. Knows costs and lengths; no sequences.
"""

from spotserve.planner.chunks import SliceCost
from spotserve.planner.roofline import NORM, StepCost, roofline_s

MOST_SLICES = 1024


def slice_lengths(cost: StepCost, tokens: float, num_stages: int) -> list[float]:
    """Lengths of the slices of a prompt, of equal computing each: later ones are shorter, since they attend to more.

    Args:
        cost: of one decoder layer.
        tokens: of the prompt, at least 1; a mean may be a fraction.
        num_stages: P, of equal depth.
    """
    work = SliceCost(constant_s=0.0, token_s=cost.token_s, pair_s=cost.pair_s)
    work_s = work.work_s(tokens, 0)
    number = num_slices(cost, tokens, work_s, num_stages)
    lengths: list[float] = []
    position = 0.0
    for _ in range(number - 1):
        lengths.append(work.tokens_within(work_s / number, position))
        position += lengths[-1]
    return [*lengths, tokens - position]


def num_slices(cost: StepCost, tokens: float, work_s: float, num_stages: int) -> int:
    """The number of slices, of `work_s` of computing together, that are soonest through stages alike."""
    if num_stages == 1:
        return 1
    most = max(1, min(int(tokens), MOST_SLICES))

    def makespan_s(number: int) -> float:
        share_s = roofline_s(work_s / number, cost.weights_s) + cost.constant_s + tokens * cost.token_link_s / number
        return (number + num_stages - 1) * share_s

    ratio = work_s / cost.weights_s if cost.weights_s > 0 else float(most)
    best: int = min(most, max(1, round(((num_stages - 1) * ratio**NORM) ** (1 / (NORM + 1)))))
    while best < most and makespan_s(best + 1) < makespan_s(best):
        best += 1
    while best > 1 and makespan_s(best - 1) <= makespan_s(best):
        best -= 1
    return best
