"""What a decoder layer does between its matrix products, on a processor: float32 and bfloat16, computed in float32.

Every kernel walks its rows one by one, and a row's own keys in the order of their positions: what is computed for a row follows
from that row alone, so neither other rows nor their number can change its bits. Nothing is padded and nothing is gathered:
keys and values are read where the paged cache has them. Compiled on first use (numba) and kept on disk; a call costs less than
a microsecond beyond its work, where the same chain of torch operations costs twenty.

bfloat16 arrives as the 16 bits that it is (`as_array`), is widened exactly, and results are rounded once, to nearest even.
Knows arrays; does not know layers, sequences or how blocks are given out.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

SERVED_DTYPES = frozenset({torch.float32, torch.bfloat16})
_LOG2_E = np.float32(1.4426950408889634)
_Array = np.ndarray[Any, Any]
NO_SINKS: _Array = np.empty(0, dtype=np.float32)


def serves(tensor: torch.Tensor) -> bool:
    """Whether the kernels compute on tensors like this one."""
    return tensor.device.type == "cpu" and tensor.dtype in SERVED_DTYPES


def as_array(tensor: torch.Tensor) -> _Array:
    """The tensor's own memory; bfloat16 as its bits."""
    array: _Array = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


def _compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compiles for this processor; keeps the result on disk where there is a place for it."""

    def compile_or_cache(function: Callable[..., Any]) -> Any:
        try:
            return njit(cache=True, nogil=True, error_model="numpy", **options)(function)
        except RuntimeError:  # neither beside this file nor in the user's cache folder can anything be written
            return njit(nogil=True, error_model="numpy", **options)(function)

    return compile_or_cache


@intrinsic
def _float_of_bits(_context: Any, _bits: Any) -> Any:
    """The float32 that has these 32 bits."""
    return types.float32(types.uint32), lambda _, builder, _signature, args: builder.bitcast(args[0], ir.FloatType())


@intrinsic
def _widen(_context: Any, value: Any) -> Any:
    """float32 as it is; the bits of a bfloat16 as the float32 that they stand for."""
    if value == types.uint16:

        def widen(_: Any, builder: Any, _signature: Any, args: Any) -> Any:
            bits = builder.zext(args[0], ir.IntType(32))
            return builder.bitcast(builder.shl(bits, ir.Constant(ir.IntType(32), 16)), ir.FloatType())

        return types.float32(value), widen
    return types.float32(types.float32), lambda _, _builder, _signature, args: args[0]


@intrinsic
def _narrow(_context: Any, _value: Any, like: Any) -> Any:
    """A float32 as an element of the kind of `like`: itself, or the bits of the nearest bfloat16 (ties to even)."""
    if like == types.uint16:

        def narrow(_: Any, builder: Any, _signature: Any, args: Any) -> Any:
            word, half = ir.IntType(32), ir.IntType(16)
            bits = builder.bitcast(args[0], word)
            sixteen = ir.Constant(word, 16)
            odd = builder.and_(builder.lshr(bits, sixteen), ir.Constant(word, 1))
            rounded = builder.add(bits, builder.add(ir.Constant(word, 0x7FFF), odd))
            return builder.trunc(builder.lshr(rounded, sixteen), half)

        return types.uint16(types.float32, like), narrow
    return types.float32(types.float32, like), lambda _, _builder, _signature, args: args[0]


@njit(inline="always")
def _exp2(x: np.float32) -> np.float32:
    """2^x for x <= 127, within two units in the last place; the polynomial is that of the Cephes library's `exp2f`."""
    x = min(max(x, np.float32(-126.0)), np.float32(127.0))
    whole = np.floor(x + np.float32(0.5))
    part = x - whole
    series = np.float32(1.535336188319500e-4)
    series = series * part + np.float32(1.339887440266574e-3)
    series = series * part + np.float32(9.618437357674640e-3)
    series = series * part + np.float32(5.550332471162809e-2)
    series = series * part + np.float32(2.402264791363012e-1)
    series = series * part + np.float32(6.931472028550421e-1)
    series = series * part + np.float32(1.0)
    return series * _float_of_bits(np.uint32((np.int32(whole) + np.int32(127)) << np.int32(23)))


@_compiled(fastmath={"reassoc", "contract"})
def add_rms_norm(rows: _Array, addend: _Array, weight: _Array, epsilon: float, total: _Array, normed: _Array) -> None:
    """total = rows + addend, rounded to the dtype; normed = total / sqrt(mean(total^2) + epsilon) * weight. All [rows, size].

    One kernel for both, whether a stage begins with it or not: two would not be bound to sum in the same order.
    """
    size = rows.shape[1]
    for row in range(rows.shape[0]):
        squares = np.float32(0)
        for at in range(size):
            rounded = _narrow(_widen(rows[row, at]) + _widen(addend[row, at]), total[row, at])
            total[row, at] = rounded
            value = _widen(rounded)
            squares += value * value
        factor = np.float32(1) / np.sqrt(squares / np.float32(size) + np.float32(epsilon))
        for at in range(size):
            normed[row, at] = _narrow(_widen(total[row, at]) * factor * _widen(weight[at]), normed[row, at])


@_compiled(fastmath={"contract"})
def silu_gate(gate_up: _Array, gated: _Array) -> None:
    """gated = silu(gate) * up; gate_up [rows, 2 * size] holds gate and up side by side, gated [rows, size]."""
    size = gated.shape[1]
    for row in range(gated.shape[0]):
        for at in range(size):
            gate = _widen(gate_up[row, at])
            up = _widen(gate_up[row, size + at])
            gated[row, at] = _narrow(gate / (np.float32(1) + _exp2(-gate * _LOG2_E)) * up, gated[row, at])


@_compiled(fastmath={"contract"})
def rotate_and_store(
    qkv: _Array,
    num_kv_heads: int,
    cos: _Array,
    sin: _Array,
    positions: _Array,
    slots: _Array,
    kv: _Array,
    query: _Array,
) -> None:
    """Turns queries and keys by their positions, and stores keys and values in their slots.

    Args:
        qkv: [rows, heads + 2 * kv_heads, head_size].
        num_kv_heads: of them.
        cos: [context, head_size].
        sin: the same; with the first half negated.
        positions: [rows].
        slots: [rows].
        kv: one layer of the cache, [slots, 2, kv_heads, head_size].
        query: [rows, heads, head_size], written.
    """
    rows, heads, size = query.shape
    half = size // 2
    for row in range(rows):
        position, slot = positions[row], slots[row]
        for head in range(heads + num_kv_heads):
            for at in range(size):
                other = at + half if at < half else at - half
                turned = _widen(qkv[row, head, at]) * _widen(cos[position, at])
                turned += _widen(qkv[row, head, other]) * _widen(sin[position, at])
                if head < heads:
                    query[row, head, at] = _narrow(turned, query[row, head, at])
                else:
                    kv[slot, 0, head - heads, at] = _narrow(turned, query[row, 0, at])
        for head in range(num_kv_heads):
            for at in range(size):
                kv[slot, 1, head, at] = qkv[row, heads + num_kv_heads + head, at]


@_compiled(fastmath={"nnan", "nsz"})
def greatest(logits: _Array, chosen: _Array) -> None:
    """chosen[row] = the lowest of the columns that hold the row's greatest value; logits [rows, columns], none of them NaN."""
    columns = logits.shape[1]
    for row in range(logits.shape[0]):
        of_row = logits[row]
        greatest, place = np.float32(-np.inf), 0
        for start in range(0, columns, 1024):
            end = min(start + 1024, columns)
            of_part = _widen(of_row[start])
            for at in range(start, end):
                value = _widen(of_row[at])
                if value > of_part:
                    of_part = value
            if of_part > greatest:
                greatest, place = of_part, start
        while _widen(of_row[place]) != greatest and place + 1 < columns:
            place += 1
        chosen[row] = place


@_compiled()
def keep_likely(scores: _Array, weights: _Array, top_k: _Array, top_p: _Array, min_p: _Array) -> None:
    """Cuts every row down to its most likely columns: what falls becomes -inf. All arrays float64, `top_k` int64.

    The columns in the order of their scores, the lower of equals first: the first `top_k` of them; of these as many as `top_p` of
    their weight takes; of these what has `min_p` times the weight of the first at least. Only columns near the top are ordered,
    deeper and deeper until the cut must be among them: a vocabulary is long and the cut is near.

    Args:
        scores: [rows, columns], cut in place.
        weights: exp(scores - the row's greatest), which is 1 at the first.
        top_k: [rows]; 0: no limit.
        top_p: [rows]; 1: no limit.
        min_p: [rows]; 0: no limit.
    """
    columns = scores.shape[1]
    for row in range(scores.shape[0]):
        of_row, weight, limit = scores[row], weights[row], top_k[row]
        top, total = of_row.max(), 0.0
        for at in range(columns):
            total += weight[at]
        depth = 8.0
        while True:
            count, mass = 0, 0.0
            for at in range(columns):
                if of_row[at] >= top - depth:
                    count += 1
                    mass += weight[at]
            enough = 0 < limit <= count or min_p[row] > np.exp(-depth)
            if enough or (limit == 0 and mass > top_p[row] * total * (1 + 1e-9)) or depth == np.inf:
                break
            depth = depth * 2 if depth < 4096 else np.inf
        near = np.empty(count, np.int64)
        filled = 0
        for at in range(columns):
            if of_row[at] >= top - depth:
                near[filled] = at
                filled += 1
        near = near[np.argsort(-of_row[near], kind="mergesort")]
        if limit > 0:
            count = min(count, limit)
            total = 0.0
            for place in range(count):
                total += weight[near[place]]
        kept, before = 1, weight[near[0]] / total
        while kept < count and not (top_p[row] < 1 and before >= top_p[row]) and weight[near[kept]] >= min_p[row]:
            before += weight[near[kept]] / total
            kept += 1
        stays = of_row[near[:kept]]
        of_row[:] = -np.inf
        for place in range(kept):
            of_row[near[place]] = stays[place]


@lru_cache(maxsize=64)
def attention_kernel(group: int, size: int) -> Callable[..., None]:
    """Attention for `group` query heads per key-value head of `size` elements; both are constants of the compiled code.

    The kernel's arguments:
        kv: one layer of the cache, [slots, 2, kv_heads, head_size].
        query: [rows, kv_heads, group, head_size].
        table: where the keys are: [rows, entries], or [1, entries] when the rows share them.
        entry_tokens: tokens per entry of the table.
        positions: [rows]; a row sees the keys up to its own position.
        window: keys that a row sees, itself included; 0: all.
        scale: factor on the scores.
        softcap: bound of the scores by tanh; 0: none.
        sinks: [kv_heads * group] a score of each head for attending to nothing, or `NO_SINKS`.
        output: [rows, kv_heads, group, head_size], written.
    """

    @_compiled(fastmath={"reassoc", "contract"})
    def attend(
        kv: _Array,
        query: _Array,
        table: _Array,
        entry_tokens: int,
        positions: _Array,
        window: int,
        scale: float,
        softcap: float,
        sinks: _Array,
        output: _Array,
    ) -> None:
        rows, heads = query.shape[0], query.shape[1]
        longest = 0
        for row in range(rows):
            longest = max(longest, positions[row] + 1)
        slots = np.empty(longest + 4, np.int64)
        scores = np.empty((group, longest + 4), np.float32)
        scaled = np.empty((group, size), np.float32)
        summed = np.empty(size, np.float32)
        factor = np.float32(scale) if softcap > 0 else np.float32(scale) * _LOG2_E
        for row in range(rows):
            of_row = table[row if table.shape[0] > 1 else 0]
            first = max(0, positions[row] + 1 - window) if window > 0 else 0
            keys = positions[row] + 1 - first
            for key in range(keys):
                slots[key] = of_row[(first + key) // entry_tokens] * entry_tokens + (first + key) % entry_tokens
            padded = (keys + 3) // 4 * 4
            for key in range(keys, padded):
                slots[key] = slots[0]
            for head in range(heads):
                for g in range(group):
                    for at in range(size):
                        scaled[g, at] = _widen(query[row, head, g, at]) * factor
                for key in range(0, padded, 4):
                    key_0, key_1 = kv[slots[key], 0, head], kv[slots[key + 1], 0, head]
                    key_2, key_3 = kv[slots[key + 2], 0, head], kv[slots[key + 3], 0, head]
                    for g in range(group):
                        score_0 = score_1 = score_2 = score_3 = np.float32(0)
                        for at in range(size):
                            q = scaled[g, at]
                            score_0 += q * _widen(key_0[at])
                            score_1 += q * _widen(key_1[at])
                            score_2 += q * _widen(key_2[at])
                            score_3 += q * _widen(key_3[at])
                        scores[g, key], scores[g, key + 1] = score_0, score_1
                        scores[g, key + 2], scores[g, key + 3] = score_2, score_3
                for g in range(group):
                    of_query = scores[g]
                    if softcap > 0:
                        for key in range(keys):
                            of_query[key] = np.tanh(of_query[key] / np.float32(softcap)) * (np.float32(softcap) * _LOG2_E)
                    largest = of_query[0]
                    for key in range(keys):
                        largest = max(largest, of_query[key])
                    total = np.float32(0)
                    if sinks.shape[0] > 0:
                        sink = sinks[head * group + g] * _LOG2_E
                        largest = max(largest, sink)
                        total = _exp2(sink - largest)
                    for key in range(keys):
                        of_query[key] = _exp2(of_query[key] - largest)
                    for key in range(keys, padded):
                        of_query[key] = np.float32(0)
                    for key in range(padded):
                        total += of_query[key]
                    for at in range(size):
                        summed[at] = np.float32(0)
                    for key in range(0, padded, 4):
                        value_0, value_1 = kv[slots[key], 1, head], kv[slots[key + 1], 1, head]
                        value_2, value_3 = kv[slots[key + 2], 1, head], kv[slots[key + 3], 1, head]
                        weight_0, weight_1 = of_query[key], of_query[key + 1]
                        weight_2, weight_3 = of_query[key + 2], of_query[key + 3]
                        for at in range(size):
                            summed[at] += (weight_0 * _widen(value_0[at]) + weight_1 * _widen(value_1[at])) + (
                                weight_2 * _widen(value_2[at]) + weight_3 * _widen(value_3[at])
                            )
                    for at in range(size):
                        output[row, head, g, at] = _narrow(summed[at] / total, output[row, head, g, at])

    kernel: Callable[..., None] = attend
    return kernel


def compile_all(dtype: torch.dtype, *, group: int, size: int) -> None:
    """Compiles every kernel for a dtype and a shape of heads, or takes it from the disk; runs no torch operation.

    For a process that is about to fork those that compute: compiling takes seconds, and each of them would do it.
    """
    kind = np.uint16 if dtype == torch.bfloat16 else np.float32
    rows, heads = np.zeros((1, 2 * size), kind), np.zeros((1, group, size), kind)
    number = np.zeros(1, np.int64)
    cache, query = np.zeros((1, 2, 1, size), kind), np.zeros((1, 1, group, size), kind)
    add_rms_norm(rows, rows.copy(), rows[0].copy(), 1e-6, rows.copy(), rows.copy())
    silu_gate(rows, np.zeros((1, size), kind))
    rotate_and_store(np.zeros((1, group + 2, size), kind), 1, rows, rows, number, number, cache, heads)
    greatest(rows, number.copy())
    attend = attention_kernel(group, size)
    attend(cache, query, np.zeros((1, 1), np.int64), 1, number, 0, 1.0, 0.0, NO_SINKS, query.copy())
