"""Into how many slices a prompt is cut for a pipeline, where reading weights hides behind computing.

`chunks` plans with a slice cost that is linear, as a worker fits it to its own steps. A roofline is not: up to its knee a longer
slice is free. With compute x over all slices and weights w per slice, m equal slices take (m + P - 1) * |(x / m, w)|_p, which is
smallest at m = ((P - 1) * (x / w)^p)^(1 / (p + 1)); p = 1 is the rule of `chunks`. Overheads move it a little: the
neighbours are tried. Knows costs and lengths; no sequences.
"""

from spotserve.planner.chunks import num_pairs
from spotserve.planner.roofline import NORM, StepCost, roofline_s


def num_slices(cost: StepCost, tokens: float, num_stages: int) -> int:
    """The number of slices of a prompt, of equal time each, that are soonest through stages alike.

    Args:
        cost: of one decoder layer.
        tokens: of the prompt, at least 1; a mean may be a fraction.
        num_stages: P.
    """
    if num_stages == 1:
        return 1
    most = int(tokens)
    compute_s = tokens * cost.token_s + num_pairs(tokens, 0) * cost.pair_s

    def layer_s(number: int) -> float:
        slice_s = roofline_s(compute_s / number, cost.weights_s) + cost.constant_s + tokens * cost.token_link_s / number
        return (number + num_stages - 1) * slice_s

    ratio = compute_s / cost.weights_s if cost.weights_s > 0 else float(most)
    best = min(most, max(1, int(((num_stages - 1) * ratio**NORM) ** (1 / (NORM + 1)))))
    while best < most and layer_s(best + 1) < layer_s(best):
        best += 1
    while best > 1 and layer_s(best - 1) <= layer_s(best):
        best -= 1
    return best
