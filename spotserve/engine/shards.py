"""What the shards of one stage do together, as seen by the arithmetic: sum partial results, put parts side by side."""

from typing import Protocol

import torch


class Shards(Protocol):
    """The M shards of one stage, seen from one of them. Every shard makes the same calls in the same order."""

    @property
    def shard(self) -> int:
        """Which one this is."""
        ...

    @property
    def tensor(self) -> int:
        """How many there are (M)."""
        ...

    def sum(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum over all shards, in the order of a fixed tree ((0 + 1) + (2 + 3)): the same bits on every shard.

        Raises:
            PeerLost: another shard is gone.
        """
        ...

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """All shards' parts side by side along the last dimension, in the order of shards.

        Raises:
            PeerLost: another shard is gone.
        """
        ...


class Alone:
    """A stage of one shard."""

    shard = 0
    tensor = 1

    def sum(self, partial: torch.Tensor) -> torch.Tensor:
        """Nothing to add."""
        return partial

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """Nothing to add."""
        return part
