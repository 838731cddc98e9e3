"""Shards as threads: the same sums on every one, and nobody waits for one that failed."""

import pytest
import torch

from spotserve.core.errors import ModelError, PeerLost
from spotserve.engine.shards import Alone, Shards
from spotserve.engine.thread_shards import run_shards, thread_shards


def test_one_shard_is_alone() -> None:
    assert isinstance(thread_shards(1)[0], Alone)


@pytest.mark.parametrize("tensor", [2, 3, 4])
def test_sums_and_gathers(tensor: int) -> None:
    parts = [torch.randn(3, 2) for _ in range(tensor)]

    def work(shard: Shards) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        part = parts[shard.shard]
        return shard.sum(part), shard.gather(part), shard.sum(-part)

    results = run_shards(thread_shards(tensor), work)
    for total, gathered, negative in results:
        assert torch.equal(total, results[0][0])
        assert torch.equal(negative, -total)
        assert torch.equal(gathered, torch.cat(parts, dim=-1))
    if tensor == 4:
        assert torch.equal(results[0][0], (parts[0] + parts[1]) + (parts[2] + parts[3]))


def test_the_error_of_a_shard_is_the_error_of_all() -> None:
    def work(shard: Shards) -> torch.Tensor:
        if shard.shard == 1:
            raise ModelError("broken")
        return shard.sum(torch.zeros(1))

    shards = thread_shards(2)
    with pytest.raises(ModelError, match="broken"):
        run_shards(shards, work)
    with pytest.raises(PeerLost):  # and it does not come back
        run_shards(shards, lambda shard: shard.sum(torch.zeros(1)))
