"""Attention over a paged KV cache, one query per row.

Invariant arithmetic by construction: a token's attention is one small problem of fixed shape, its own query heads against its
own keys in the order of positions. On a processor a compiled kernel computes it in place (`kernels`). Elsewhere the keys are
gathered and padded to a length that follows from the token's position alone; rows that share keys read them through a stride of
zero instead of a copy, which changes addresses, not sums. Neither other sequences, nor the cut of a prompt into chunks, nor
the number of draft tokens change what is computed for a token, so they cannot change its bits.

On a GPU the rows beside it choose the kernel of every matrix product, so its bits are not to be had in any case; there rows that
share keys are one problem (`RowGroup.lanes`), and a token's result is the same up to rounding.

Knows tensors and positions; does not know requests or how blocks are given out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from spotserve.core.errors import ModelError
from spotserve.engine import kernels
from spotserve.engine.device import on_device

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
    lanes: torch.Tensor | None = None
    """[table rows, lanes] which rows of the group read each row of the table, counted from `start`; spare lanes repeat one. Given
    where rows that share keys are to be one problem; None: each row is a problem of its own."""
    lane_of: torch.Tensor | None = None
    """[rows] where in the lanes each row is."""
    masks: dict[tuple[int | None, int], torch.Tensor] = field(default_factory=dict)
    """By sliding window (None: full) and queries per kv head, made when first asked for."""

    def mask(self, *, window: int | None, queries: int, dtype: torch.dtype) -> torch.Tensor:
        """0 where a key is at or before the query (and inside its window), -inf elsewhere: [problems, 1, queries of each, keys].

        `queries`: of a row to one kv head.
        """
        if (window, queries) not in self.masks:
            keys = torch.arange(self.num_keys, device=self.positions.device)
            positions = self.positions[:, None] if self.lanes is None else self.positions[self.lanes][:, :, None]
            hidden = keys > positions
            if window is not None:
                hidden |= keys <= positions - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
            if self.lanes is None:
                self.masks[window, queries] = mask[:, None, None, :].expand(-1, -1, queries, -1)
            else:
                self.masks[window, queries] = mask.repeat_interleave(queries, dim=1)[:, None]
        return self.masks[window, queries]

    def spread(self, query: torch.Tensor) -> torch.Tensor:
        """[rows, kv_heads, queries, head_size] -> [problems, kv_heads, queries of each, head_size]"""
        if self.lanes is None:
            return query
        lanes = query[self.lanes].transpose(1, 2)  # [problems, kv_heads, lanes, queries, head_size]
        return lanes.reshape(*lanes.shape[:2], -1, lanes.shape[4])

    def collect(self, output: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The reverse of `spread`; `like` has the shape of what was spread."""
        if self.lanes is None:
            return output
        _, kv_heads, queries, head_size = like.shape
        lanes = output.view(output.shape[0], kv_heads, -1, queries, head_size).transpose(1, 2)
        return lanes.reshape(-1, kv_heads, queries, head_size)[self.lane_of]


class KvCache:
    """Keys and values of one rank's layers and heads: [slots, 2, kv_heads, head_size] each, a slot per token, block by block."""

    def __init__(
        self,
        layers: range,
        *,
        num_kv_heads: int,
        head_size: int,
        num_blocks: int,
        block_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`layers` are indices in the model, `num_kv_heads` those of this shard; `num_blocks` counts the scratch block."""
        self.layers = layers
        self.block_tokens = block_tokens
        self.device = device
        self.dtype = dtype
        self._num_blocks = num_blocks
        shape = (num_blocks * block_tokens, 2, num_kv_heads, head_size)
        # Zeros, not garbage: masked keys get weight 0, and 0 times a stray NaN would still be NaN.
        self._slots = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self._arrays = [kernels.as_array(slots) for slots in self._slots if kernels.serves(slots)]
        self.scratch = torch.empty(0, dtype=dtype, device=device)
        """What `gather` writes to."""

    def layer(self, layer: int) -> torch.Tensor:
        """The slots of a layer, by its index in the model."""
        return self._slots[layer - self.layers.start]

    def array(self, layer: int) -> np.ndarray[Any, Any]:
        """`layer` for compiled kernels: the same memory."""
        return self._arrays[layer - self.layers.start]

    def gather(self, layer: int, group: RowGroup) -> torch.Tensor:
        """Keys and values of a group: [table rows, keys, 2, kv_heads, head_size], valid until the next call."""
        slots = self.layer(layer)
        source = slots.view(slots.shape[0] if group.by_slot else self._num_blocks, -1)
        entries = group.table.numel()
        if self.scratch.numel() < entries * source.shape[1]:
            self.scratch = torch.empty(2 * entries * source.shape[1], dtype=slots.dtype, device=slots.device)
        into = self.scratch[: entries * source.shape[1]].view(entries, source.shape[1])
        torch.index_select(source, 0, group.table.view(-1), out=into)
        return into.view(group.table.shape[0], group.num_keys, *slots.shape[1:])

    def move(self, *, sources: Sequence[int], destinations: Sequence[int]) -> None:
        """Copies slots in every layer, all reads before all writes."""
        read, write = self._indices(sources), self._indices(destinations)
        for slots in self._slots:
            slots.index_copy_(0, write, slots.index_select(0, read))

    def read(self, layer: int, slots: Sequence[int], heads: range) -> torch.Tensor:
        """A copy [tokens, 2, heads, head_size] in the processor's memory; `heads` counts from this shard's first."""
        return self.layer(layer)[:, :, heads.start : heads.stop].index_select(0, self._indices(slots)).cpu()

    def write(self, layer: int, slots: Sequence[int], heads: range, values: torch.Tensor) -> None:
        """The reverse of `read`."""
        self.layer(layer)[:, :, heads.start : heads.stop].index_copy_(0, self._indices(slots), values.to(self.device))

    def _indices(self, slots: Sequence[int]) -> torch.Tensor:
        return on_device(slots, self.device)


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """What attention has to know about the rows of one step."""

    cache: KvCache
    write_slots: torch.Tensor
    """[rows]"""
    groups: tuple[RowGroup, ...]
    """Cover all rows, in order."""

    @property
    def num_real_rows(self) -> int:
        """Rows before those that only pad the step, which stand at its end. For a processor: elsewhere it would have to wait."""
        return int(np.count_nonzero(self.write_slots.numpy(force=True) >= (SCRATCH_BLOCK + 1) * self.cache.block_tokens))

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
        sinks: torch.Tensor | None = None,
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
            sinks: [kv_heads * queries per kv head] a score of each head for attending to nothing; None: none.

        Returns:
            [rows, kv_heads * queries per kv head * head_size].
        """
        self.cache.layer(layer).index_copy_(0, self.write_slots, torch.stack((key, value), dim=1))
        return self.attend_stored(layer, query, scale=scale, window=window, softcap=softcap, sinks=sinks)

    def attend_stored(
        self,
        layer: int,
        query: torch.Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`attend` when the rows' keys and values are in the cache already.

        On a processor `query` may have fewer rows than the step: those of the others are not wanted then.
        """
        num_rows = query.shape[0]
        if kernels.serves(query):
            return self._attend_rows(layer, query.contiguous(), scale, window, softcap, sinks).view(num_rows, -1)
        if len(self.groups) == 1:
            return self._attend_group(layer, self.groups[0], query, scale, window, softcap, sinks).reshape(num_rows, -1)
        output = query.new_empty(query.shape)
        for group in self.groups:
            part = query[group.start : group.end]
            output[group.start : group.end] = self._attend_group(layer, group, part, scale, window, softcap, sinks)
        return output.view(num_rows, -1)

    def _attend_rows(
        self,
        layer: int,
        query: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Row by row, each over its own keys and no padding."""
        num_rows, _, group_size, head_size = query.shape
        attend = kernels.attention_kernel(group_size, head_size)
        output = torch.empty_like(query)
        slots, queries, outputs = self.cache.array(layer), kernels.as_array(query), kernels.as_array(output)
        of_heads = kernels.NO_SINKS if sinks is None else sinks.float().numpy()
        for group in self.groups:
            rows = slice(group.start, min(group.end, num_rows))
            entry_tokens = 1 if group.by_slot else self.cache.block_tokens
            table, positions = group.table.numpy(), group.positions.numpy()
            attend(
                slots, queries[rows], table, entry_tokens, positions, window or 0, scale, softcap or 0.0, of_heads, outputs[rows]
            )
        return output

    def _attend_group(
        self,
        layer: int,
        group: RowGroup,
        query: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        given, queries_per_head = query, query.shape[2]
        mask = group.mask(window=window, queries=queries_per_head, dtype=query.dtype)
        query = group.spread(given)
        kept = self.cache.gather(layer, group)  # [table rows, keys, 2, kv_heads, head_size]
        keys, values = kept.permute(2, 0, 3, 1, 4).expand(2, query.shape[0], -1, -1, -1)  # [problems, kv_heads, keys, head_size]
        if softcap is None and sinks is None:
            attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
            return group.collect(attended, given)
        # One product per problem and head, in batches: `matmul` would choose its kernel by the number of rows.
        queries, keys, values = (part.reshape(-1, *part.shape[2:]) for part in (query, keys, values))
        scores = torch.bmm(queries, keys.transpose(1, 2))
        scores = scores * scale if softcap is None else torch.tanh(scores * (scale / softcap)) * softcap
        masked = scores.view(*query.shape[:3], -1) + mask  # [problems, kv_heads, queries of each, keys]
        if sinks is None:
            weights = masked.softmax(dim=-1)
        else:
            sink = sinks.to(masked.dtype).view(1, query.shape[1], 1, queries_per_head)
            sink = sink.expand(query.shape[0], -1, query.shape[2] // queries_per_head, -1).reshape(*query.shape[:3], 1)
            weights = torch.cat((masked, sink), dim=-1).softmax(dim=-1)[..., :-1]
        return group.collect(torch.bmm(weights.reshape(scores.shape), values).view(query.shape), given)


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
    s_aux: torch.Tensor | None = None,
    paged: PagedBatch | None = None,
    **further: object,
) -> tuple[torch.Tensor, None]:
    """What the library's attention layers call: query [1, heads, rows, head_size], key and value [1, kv_heads, rows, head_size],
    values may be shorter.

    Raises:
        ModelError: the layer wants something that this attention does not do.
    """
    unknown = [name for name in ("position_bias", "cache") if further.get(name) is not None]
    value_size = value.shape[3]
    if paged is None or attention_mask is not None or unknown or key.shape[:3] != value.shape[:3] or value_size > key.shape[3]:
        raise ModelError(f"{type(module).__name__} needs attention that SpotServe does not do {unknown or ''}".rstrip())
    num_kv_heads, num_rows, head_size = key.shape[1:]
    value = F.pad(value, (0, head_size - value_size))  # one cache for both: the rest of shorter values is 0
    by_row = query[0].transpose(0, 1).reshape(num_rows, num_kv_heads, -1, head_size)
    scale = head_size**-0.5 if scaling is None else scaling
    layer = module.layer_idx
    assert isinstance(layer, int)
    output = paged.attend(
        layer,
        by_row,
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scale=scale,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    return output.view(1, num_rows, -1, head_size)[..., :value_size], None


AttentionInterface.register(ATTENTION_NAME, paged_attention)
