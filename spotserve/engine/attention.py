"""Attention over a paged KV cache, one query per row.

Invariant arithmetic by construction: a token's attention is one small problem of fixed shape (its own query heads against its
own keys, gathered in the order of positions and padded to a length that follows from its position alone). Neither other
sequences, nor the cut of a prompt into chunks, nor the number of draft tokens change what is computed for it, so they cannot
change its bits. Rows that share keys read them through a stride of zero instead of a copy, which changes addresses, not sums.

Knows tensors and positions; does not know requests or how blocks are given out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from spotserve.core.errors import ModelError
from spotserve.core.model import ModelSpec

ATTENTION_NAME = "spotserve_paged"
SCRATCH_BLOCK = 0
"""Padding rows write here, and tables are padded with it; no sequence holds it."""
_SMALLEST_PADDING_TOKENS = 64


def padded_blocks(position: int, *, block_tokens: int) -> int:
    """Blocks of keys that the query at `position` reads: enough for it, in steps of an eighth to a quarter of the length.

    A function of the position alone; coarse steps let most rows of a step share one call, fine ones waste fewer bytes.
    """
    needed = position // block_tokens + 1
    smallest = 1 << (max(1, _SMALLEST_PADDING_TOKENS // block_tokens).bit_length() - 1)  # powers of two: steps nest
    step = max(smallest, 1 << max(0, needed.bit_length() - 3))
    return -(-needed // step) * step


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows `start` to `end` of a step, all padded to the same number of keys."""

    start: int
    end: int
    table: torch.Tensor
    """Where the keys are: [rows, entries], or [1, entries] when the rows share them. Of blocks, or of slots if `by_slot`."""
    by_slot: bool
    positions: torch.Tensor
    """[rows]"""
    num_keys: int
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)
    """Additive masks [rows, 1, 1, keys] by sliding window (None: full), made when first asked for."""

    def mask(self, *, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """0 where a key is at or before the query (and inside its window), -inf elsewhere."""
        if window not in self.masks:
            keys = torch.arange(self.num_keys, device=self.positions.device)
            positions = self.positions[:, None]
            hidden = keys > positions
            if window is not None:
                hidden |= keys <= positions - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
            self.masks[window] = mask[:, None, None, :]
        return self.masks[window]


class KvCache:
    """Keys and values of every layer: [slots, 2, kv_heads, head_size], a slot per token, block by block."""

    def __init__(self, spec: ModelSpec, *, num_blocks: int, block_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        """`num_blocks` counts the scratch block."""
        self.block_tokens = block_tokens
        self._num_blocks = num_blocks
        shape = (num_blocks * block_tokens, 2, spec.num_kv_heads, spec.head_size)
        # Zeros, not garbage: masked keys get weight 0, and 0 times a stray NaN would still be NaN.
        self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(spec.num_layers)]
        self._scratch = torch.empty(0, dtype=dtype, device=device)

    def gather(self, layer: int, group: RowGroup) -> torch.Tensor:
        """Keys and values of a group: [table rows, keys, 2, kv_heads, head_size], valid until the next call."""
        slots = self.layers[layer]
        source = slots.view(slots.shape[0] if group.by_slot else self._num_blocks, -1)
        entries = group.table.numel()
        if self._scratch.numel() < entries * source.shape[1]:
            self._scratch = torch.empty(2 * entries * source.shape[1], dtype=slots.dtype, device=slots.device)
        into = self._scratch[: entries * source.shape[1]].view(entries, source.shape[1])
        torch.index_select(source, 0, group.table.view(-1), out=into)
        return into.view(group.table.shape[0], group.num_keys, *slots.shape[1:])

    def move(self, *, sources: Sequence[int], destinations: Sequence[int]) -> None:
        """Copies slots in every layer, all reads before all writes."""
        device = self.layers[0].device
        read, write = torch.tensor(sources, device=device), torch.tensor(destinations, device=device)
        for slots in self.layers:
            slots.index_copy_(0, write, slots.index_select(0, read))

    def read(self, layer: int, slots: Sequence[int]) -> torch.Tensor:
        """A copy [2, tokens, kv_heads, head_size]."""
        kept = self.layers[layer].index_select(0, torch.tensor(slots, dtype=torch.int64, device=self.layers[layer].device))
        return kept.transpose(0, 1).contiguous()

    def write(self, layer: int, slots: Sequence[int], values: torch.Tensor) -> None:
        """The reverse of `read`."""
        cache = self.layers[layer]
        cache.index_copy_(0, torch.tensor(slots, dtype=torch.int64, device=cache.device), values.to(cache.device).transpose(0, 1))


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """What attention has to know about the rows of one step."""

    cache: KvCache
    write_slots: torch.Tensor
    """[rows]"""
    groups: tuple[RowGroup, ...]
    """Cover all rows, in order."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """Stores the rows' keys and values, then attends.

        Args:
            layer: index of the decoder layer.
            query: [rows, kv_heads, queries per kv head, head_size].
            key: [rows, kv_heads, head_size].
            value: the same.
            scale: factor on the scores.
            window: keys that a query sees, itself included; None: all.
            softcap: bound of the scores by tanh; None: none.

        Returns:
            [rows, kv_heads * queries per kv head * head_size].
        """
        self.cache.layers[layer].index_copy_(0, self.write_slots, torch.stack((key, value), dim=1))
        num_rows = query.shape[0]
        if len(self.groups) == 1:
            return self._attend_group(layer, self.groups[0], query, scale, window, softcap).reshape(num_rows, -1)
        output = query.new_empty(query.shape)
        for group in self.groups:
            part = query[group.start : group.end]
            output[group.start : group.end] = self._attend_group(layer, group, part, scale, window, softcap)
        return output.view(num_rows, -1)

    def _attend_group(
        self, layer: int, group: RowGroup, query: torch.Tensor, scale: float, window: int | None, softcap: float | None
    ) -> torch.Tensor:
        mask = group.mask(window=window, dtype=query.dtype)
        kept = self.cache.gather(layer, group)  # [table rows, keys, 2, kv_heads, head_size]
        keys, values = kept.permute(2, 0, 3, 1, 4).expand(2, query.shape[0], -1, -1, -1)  # [rows, kv_heads, keys, head_size] each
        if softcap is None:
            return F.scaled_dot_product_attention(
                query, keys, values, attn_mask=mask.expand(-1, -1, query.shape[2], -1), scale=scale
            )
        # One product per row and head, in batches: `matmul` would choose its kernel by the number of rows.
        queries, keys, values = (part.reshape(-1, *part.shape[2:]) for part in (query, keys, values))
        scores = torch.tanh(torch.bmm(queries, keys.transpose(1, 2)) * (scale / softcap)) * softcap
        weights = (scores.view(*query.shape[:3], -1) + mask).softmax(dim=-1).view(scores.shape)
        return torch.bmm(weights, values).view(query.shape)


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    paged: PagedBatch | None = None,
    **further: object,
) -> tuple[torch.Tensor, None]:
    """What the library's attention layers call: query [1, heads, rows, head_size], key and value [1, kv_heads, rows, head_size].

    Raises:
        ModelError: the layer wants something that this attention does not do.
    """
    unknown = [name for name in ("s_aux", "position_bias", "cache") if further.get(name) is not None]
    if paged is None or attention_mask is not None or unknown or key.shape != value.shape:
        raise ModelError(f"{type(module).__name__} needs attention that SpotServe does not do {unknown or ''}".rstrip())
    num_kv_heads, num_rows, head_size = key.shape[1:]
    by_row = query[0].transpose(0, 1).reshape(num_rows, num_kv_heads, -1, head_size)
    scale = head_size**-0.5 if scaling is None else scaling
    layer = module.layer_idx
    assert isinstance(layer, int)
    output = paged.attend(
        layer, by_row, key[0].transpose(0, 1), value[0].transpose(0, 1), scale=scale, window=sliding_window, softcap=softcap
    )
    return output.view(1, num_rows, -1, head_size), None


AttentionInterface.register(ATTENTION_NAME, paged_attention)
