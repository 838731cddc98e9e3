"""Fencing numbers: of two owners of one request, the one with the larger epoch is right.

An epoch counts two things. The upper part counts how often the gateway has dispatched the request; the lower part counts the
hand-overs between workers since the last dispatch. A gateway that lost sight of a request dispatches it anew and is thereby
ahead of every hand-over that it may not have heard of.
"""

_HAND_OVER_BITS = 16


def first_epoch() -> int:
    """Epoch of a request's first dispatch."""
    return 1 << _HAND_OVER_BITS


def after_dispatch(epoch: int) -> int:
    """Epoch of the next dispatch by a gateway that last knew `epoch`."""
    return ((epoch >> _HAND_OVER_BITS) + 1) << _HAND_OVER_BITS


def after_hand_over(epoch: int) -> int:
    """Epoch of the worker that takes the sequence over from the owner of `epoch`."""
    return epoch + 1
