"""What a fused stage does between its matrix products: by compiled kernels on a processor, by torch elsewhere.

On a GPU a step of a small batch is the cost of its calls: what the library says in many is one there, if torch has it.

Both compute the same functions. Which one is used follows from dtype and device alone, never from a step, so that it cannot make
a token depend on its neighbours.
"""

from typing import Protocol

import torch
import torch.nn.functional as F

from spotserve.engine import kernels
from spotserve.engine.attention import PagedBatch
from spotserve.engine.linear import Map, padded_rows
from spotserve.engine.skeleton import LibraryModule


class Norm(Protocol):
    """RMS norm of a residual stream."""

    def __call__(self, rows: torch.Tensor, addend: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """`rows + addend`, and its norm; each [rows, size]."""
        ...


class Rotary:
    """Tables that turn queries and keys by their positions."""

    def __init__(self, rotary: LibraryModule, *, context_tokens: int, like: torch.Tensor, device: torch.device) -> None:
        """Computed where `like` is, in its dtype; kept on `device`."""
        cos, sin = (part.to(device) for part in rotary(like, position_ids=torch.arange(context_tokens, device=like.device)[None]))
        half = cos.shape[-1] // 2
        # rotate_half(x) * sin = roll(x) * (sin with its first half negated): one call less, the same products.
        self.cos = cos[0].contiguous()  # [context, head_size]
        self.sin = torch.cat((-sin[0, :, :half], sin[0, :, half:]), dim=-1).contiguous()
        self.arrays = (kernels.as_array(self.cos), kernels.as_array(self.sin)) if kernels.serves(self.cos) else None
        self._last: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [rows, 1, head_size]; looked up once for all layers of a step, which ask with the same tensor."""
        if self._last is None or self._last[0] is not positions:
            cos, sin = (table.index_select(0, positions)[:, None] for table in (self.cos, self.sin))
            self._last = positions, cos, sin
        return self._last[1:]


class Arithmetic(Protocol):
    """See above."""

    def rows_to_compute(self, paged: PagedBatch) -> int:
        """How many rows of the step to compute, from the first on; what is left out only pads."""
        ...

    def norm(self, module: LibraryModule) -> Norm:
        """The library's RMS norm."""
        ...

    def gate(self, activation: Map) -> Map:
        """[rows, 2 * size], gate and up side by side, -> activation(gate) * up [rows, size]."""
        ...

    def attend(
        self,
        paged: PagedBatch,
        layer: int,
        qkv: torch.Tensor,
        *,
        positions: torch.Tensor,
        rotary: Rotary,
        kv_heads: int,
        scale: float,
    ) -> torch.Tensor:
        """Turns queries and keys, stores keys and values, attends.

        Args:
            paged: the step.
            layer: index in the model.
            qkv: [rows, heads + 2 * kv_heads, head_size].
            positions: [rows].
            rotary: the tables.
            kv_heads: of this shard.
            scale: factor on the scores.

        Returns:
            [rows, heads * head_size].
        """
        ...


class KernelArithmetic:
    """float32 and bfloat16 on a processor."""

    def rows_to_compute(self, paged: PagedBatch) -> int:
        """See `Arithmetic`."""
        return min(padded_rows(paged.num_real_rows), paged.write_slots.shape[0])

    def norm(self, module: LibraryModule) -> Norm:
        """See `Arithmetic`."""
        weight, epsilon = kernels.as_array(module.weight.detach()), float(module.variance_epsilon)

        def norm(rows: torch.Tensor, addend: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
            total, normed = torch.empty_like(rows), torch.empty_like(rows)
            addend = torch.zeros_like(rows) if addend is None else addend
            as_array = kernels.as_array
            kernels.add_rms_norm(as_array(rows), as_array(addend), weight, epsilon, as_array(total), as_array(normed))
            return total, normed

        return norm

    def gate(self, activation: Map) -> Map:
        """See `Arithmetic`."""
        if type(activation).__name__ not in ("SiLU", "SiLUActivation"):
            return _plain_gate(activation)

        def gate(gate_up: torch.Tensor) -> torch.Tensor:
            gated = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
            kernels.silu_gate(kernels.as_array(gate_up), kernels.as_array(gated))
            return gated

        return gate

    def attend(
        self,
        paged: PagedBatch,
        layer: int,
        qkv: torch.Tensor,
        *,
        positions: torch.Tensor,
        rotary: Rotary,
        kv_heads: int,
        scale: float,
    ) -> torch.Tensor:
        """See `Arithmetic`."""
        num_rows, heads, head_size = qkv.shape[0], qkv.shape[1] - 2 * kv_heads, qkv.shape[2]
        query = qkv.new_empty(num_rows, kv_heads, heads // kv_heads, head_size)
        assert rotary.arrays is not None
        as_array = kernels.as_array
        kernels.rotate_and_store(
            as_array(qkv),
            kv_heads,
            *rotary.arrays,
            positions.numpy(),
            paged.write_slots.numpy(),
            paged.cache.array(layer),
            as_array(query.view(num_rows, heads, head_size)),
        )
        return paged.attend_stored(layer, query, scale=scale)


class TorchArithmetic:
    """Every dtype and device that torch has."""

    def rows_to_compute(self, paged: PagedBatch) -> int:
        """See `Arithmetic`."""
        return paged.write_slots.shape[0]

    def norm(self, module: LibraryModule) -> Norm:
        """See `Arithmetic`."""

        def norm(rows: torch.Tensor, addend: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
            total = rows if addend is None else rows + addend
            return total, module(total)

        return norm

    def gate(self, activation: Map) -> Map:
        """See `Arithmetic`."""
        return _plain_gate(activation)

    def attend(
        self,
        paged: PagedBatch,
        layer: int,
        qkv: torch.Tensor,
        *,
        positions: torch.Tensor,
        rotary: Rotary,
        kv_heads: int,
        scale: float,
    ) -> torch.Tensor:
        """See `Arithmetic`."""
        num_rows, head_size = qkv.shape[0], qkv.shape[2]
        cos, sin = rotary.at(positions)
        turned = qkv[:, :-kv_heads]  # queries and keys [rows, heads + kv_heads, head_size]
        turned = torch.addcmul(turned * cos, turned.roll(head_size // 2, -1), sin)
        query = turned[:, :-kv_heads].reshape(num_rows, kv_heads, -1, head_size)
        return paged.attend(layer, query, turned[:, -kv_heads:], qkv[:, -kv_heads:], scale=scale)


class GpuArithmetic(TorchArithmetic):
    """Every dtype, on a GPU."""

    def norm(self, module: LibraryModule) -> Norm:
        """See `Arithmetic`; one call for the library's eight."""
        weight, epsilon = module.weight.detach(), float(module.variance_epsilon)

        def norm(rows: torch.Tensor, addend: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
            total = rows if addend is None else rows + addend
            return total, F.rms_norm(total, weight.shape, weight, epsilon)

        return norm


def arithmetic_for(weight: torch.Tensor) -> Arithmetic:
    """The fastest of those that compute on tensors like `weight`."""
    if kernels.serves(weight):
        return KernelArithmetic()
    return GpuArithmetic() if weight.device.type == "cuda" else TorchArithmetic()


def _plain_gate(activation: Map) -> Map:
    def gate(gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return activation(gate) * up

    return gate
