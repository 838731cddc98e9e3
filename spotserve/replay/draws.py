"""Numbers that depend on a seed and an identity alone: adding a row to a trace does not move other draws. Pure."""

from hashlib import sha256


def share_drawn(seed: int, *identity: object) -> float:
    """A number in [0, 1)."""
    return drawn_seed(seed, *identity) / 2**64


def drawn_seed(seed: int, *identity: object) -> int:
    """An unsigned 64-bit number."""
    return int.from_bytes(sha256(repr((seed, *identity)).encode()).digest()[:8], "big")
