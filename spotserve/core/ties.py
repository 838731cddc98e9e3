"""When two copies of one sequence may honestly differ: below which lead a chosen token counts as a near tie.

The lead is the `gaps` value of a token: chosen over runner-up in perturbed log-probability, both computed in float64 from the
model's logits. Two runs whose logits differ by at most e can disagree only where the lead is below 2e.
"""

from collections.abc import Mapping

_NEAR_TIE_GAP: Mapping[str, float] = {
    "float64": 0.0,
    # One kernel per row whatever the batch leaves nothing within one build; another thread count, or the library's own forward,
    # moves logits of standard deviation 1.8 by at most 1e-5.
    "float32": 1e-4,
    # Logits themselves are rounded to 8 bits: 0.03 to 0.06 was measured between query lengths of the library's own attention.
    "bfloat16": 0.125,
    # Three bits more than bfloat16.
    "float16": 0.016,
}


def near_tie_gap(dtype: str) -> float:
    """Lead at or below which a token of a model in `dtype` may flip for rounding alone.

    Raises:
        KeyError: the dtype is none that the engine computes in.
    """
    return _NEAR_TIE_GAP[dtype]
