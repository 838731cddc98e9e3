"""Attention of a row has the same bits however its keys are found and whoever stands beside it."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from spotserve.engine.attention import KvCache, PagedBatch, RowGroup, padded_blocks

BLOCK_TOKENS = 16


def random_cache(dtype: torch.dtype) -> KvCache:
    """One layer of two heads, eight blocks and the scratch block."""
    shape = {"num_kv_heads": 2, "head_size": 16, "num_blocks": 9, "block_tokens": BLOCK_TOKENS}
    cache = KvCache(range(1), dtype=dtype, device=torch.device("cpu"), **shape)
    cache.layer(0).normal_()
    return cache


@example(position=64, block_tokens=1)
@given(position=st.integers(0, 40_000), block_tokens=st.integers(1, 100))
def test_padding_depends_on_position_alone_and_nests(position: int, block_tokens: int) -> None:
    blocks = padded_blocks(position, block_tokens=block_tokens)
    assert blocks * block_tokens > position
    assert padded_blocks(blocks * block_tokens - 1, block_tokens=block_tokens) == blocks, "a run must end where the padding changes"
    needed_tokens = (position // block_tokens + 1) * block_tokens
    assert blocks * block_tokens < needed_tokens + max(64, block_tokens, needed_tokens / 4), "less than one step is wasted"


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_tables_of_every_kind_give_the_same_bits(dtype: torch.dtype, window: int | None, softcap: float | None) -> None:
    torch.manual_seed(0)
    cache = random_cache(dtype)
    num_rows, num_keys = 8, 128
    positions = torch.arange(110, 110 + num_rows)
    query = torch.randn(num_rows, 2, 2, 16, dtype=dtype)
    blocks = torch.tensor([5, 1, 7, 3, 8, 2, 6, 4])
    slots = (blocks[:, None] * BLOCK_TOKENS + torch.arange(BLOCK_TOKENS)).flatten()
    key, value = (cache.layer(0)[slots[positions], which].clone() for which in (0, 1))  # writes what is there already

    def attend(rows: slice, *groups: RowGroup) -> torch.Tensor:
        batch = PagedBatch(cache, slots[positions[rows]], groups)
        return batch.attend(0, query[rows], key[rows], value[rows], scale=0.25, window=window, softcap=softcap)

    shared = attend(slice(0, 8), RowGroup(0, 8, blocks[None], False, positions, num_keys))
    own = attend(slice(0, 8), RowGroup(0, 8, blocks.repeat(8, 1), False, positions, num_keys))
    by_slot = attend(slice(0, 8), RowGroup(0, 8, slots.repeat(8, 1), True, positions, num_keys))
    first, rest = RowGroup(0, 3, blocks[None], False, positions[:3], num_keys), slots.repeat(5, 1)
    mixed = attend(slice(0, 8), first, RowGroup(3, 8, rest, True, positions[3:], num_keys))
    for other in (own, by_slot, mixed):
        assert torch.equal(other, shared)
    for row in range(num_rows):
        alone = attend(slice(row, row + 1), RowGroup(0, 1, blocks[None], False, positions[row : row + 1], num_keys))
        assert torch.equal(alone[0], shared[row])


@pytest.mark.parametrize("sinks", [None, torch.tensor([-3.0, 0.0, 2.0, 50.0, 1.0, -1.0])], ids=["no-sinks", "sinks"])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-9), (torch.float32, 2e-6), (torch.bfloat16, 0.02)],
    ids=["float64", "float32", "bfloat16"],
)
def test_it_is_what_the_formula_says(
    dtype: torch.dtype, tolerance: float, window: int | None, softcap: float | None, sinks: torch.Tensor | None
) -> None:
    """softmax(cap(q k)) v over the keys that a row sees, written out in float64, row by row."""
    torch.manual_seed(1)
    cache, blocks, positions = random_cache(dtype), torch.tensor([5, 1, 7, 3, 8, 2, 6, 4]), torch.tensor([0, 1, 2, 3, 17, 64, 127])
    slots = (blocks[:, None] * BLOCK_TOKENS + torch.arange(BLOCK_TOKENS)).flatten()
    query = torch.randn(len(positions), 2, 3, 16, dtype=dtype)
    group = RowGroup(0, len(positions), blocks[None], False, positions, 128)
    batch = PagedBatch(cache, slots[positions], (group,))
    got = batch.attend_stored(0, query, scale=0.4, window=window, softcap=softcap, sinks=sinks).view(query.shape)
    for row, position in enumerate(positions.tolist()):
        first = 0 if window is None else max(0, position - window + 1)
        keys, values = cache.layer(0)[slots[first : position + 1]].double().permute(1, 2, 0, 3)  # [kv_heads, keys, size] each
        scores = query[row].double() @ keys.transpose(1, 2) * 0.4
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        of_nothing = torch.full((2, 3, 1), -torch.inf) if sinks is None else sinks.view(2, 3, 1)
        weights = torch.cat((scores, of_nothing.double()), dim=-1).softmax(dim=-1)[..., :-1]
        assert torch.allclose(got[row].double(), weights @ values, atol=tolerance, rtol=0)
