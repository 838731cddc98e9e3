"""How fast a replica is: all that queueing and search need to know of it.

What it is made of (a roofline, a published profile) is behind the Protocol.
"""

from typing import Protocol


class ReplicaSpeed(Protocol):
    """One replica, with its stages, shards and hardware. Times are of a replica that is otherwise idle."""

    def __hash__(self) -> int:
        """Equal speeds are reckoned once."""
        ...

    @property
    def max_batch(self) -> int:
        """Sequences that it runs at once."""
        ...

    @property
    def kv_tokens(self) -> int:
        """Tokens that its KV cache holds in all."""
        ...

    def token_s(self, sequences: float, context_tokens: float) -> float:
        """Between two tokens of one sequence when so many run, with so many tokens of context together."""
        ...

    def prompt_s(self, tokens: float) -> float:
        """For how long a prompt keeps everything else waiting: its time on the slowest stage."""
        ...

    def first_token_s(self, tokens: float) -> float:
        """Until a prompt is through all stages."""
        ...
