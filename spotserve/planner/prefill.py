"""Into how many slices a prompt is cut for a pipeline, where reading weights hides behind computing.

`chunks` plans with a slice cost that is linear, as a worker fits it to its own steps. A roofline is not: up to its knee a longer
slice is free. With compute x over all slices, weights w and overhead c per slice, m equal slices take (m + P - 1) * (|(x / m, w)|_p
+ c): a norm of functions that are convex in m, and a line, hence convex. Knows costs and lengths; no sequences.
"""

from bisect import bisect_left

from spotserve.planner.chunks import num_pairs
from spotserve.planner.roofline import StepCost, roofline_s


def num_slices(cost: StepCost, tokens: float, num_stages: int) -> int:
    """The number of slices of a prompt, of equal time each, that are soonest through stages alike.

    Args:
        cost: of one decoder layer.
        tokens: of the prompt, at least 1; a mean may be a fraction.
        num_stages: P.
    """
    if num_stages == 1:
        return 1
    compute_s = tokens * cost.token_s + num_pairs(tokens, 0) * cost.pair_s

    def layer_s(number: int) -> float:
        slice_s = roofline_s(compute_s / number, cost.weights_s) + cost.constant_s + tokens * cost.token_link_s / number
        return (number + num_stages - 1) * slice_s

    return 1 + bisect_left(range(1, int(tokens)), True, key=lambda number: layer_s(number + 1) >= layer_s(number))
