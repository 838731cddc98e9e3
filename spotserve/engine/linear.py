"""A linear layer as one call, with its weights laid out for the processor once.

oneDNN's packed product takes half the time of the plain one and less at the sizes of a decode step (AVX-512, 2 to 128 rows,
float32 and bfloat16). It gives a row the same bits whatever the other rows are and however many, from `LEAST_ROWS` on, with one
thread or two, and a column the same bits however many columns are computed with it: columns may be sharded freely. Where torch
cannot pack (float64, float16, other devices) the plain product is used.

What shards cannot do freely is add: the sum over the inputs of a layer that is sharded along them depends on where it is cut.
`row_sharded_map` with `invariant="full"` therefore cuts it into `INPUT_GROUPS` groups whatever the number of shards and adds their
products in a fixed tree, ((0 + 1) + (2 + 3)), of which every shard computes its part and `Shards.sum` the rest.
"""

import os
from collections.abc import Callable, Sequence
from typing import Final, Literal

import torch
import torch.nn.functional as F

from spotserve.core.errors import ModelError
from spotserve.engine.shards import Shards

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
"""With the tiles of newer processors (AMX) the bits of a row depend on how many others there are. The library reads this when it
computes for the first time; who sets it is left alone."""

Map = Callable[[torch.Tensor], torch.Tensor]
Quantization = Literal["none", "int8"]

LEAST_ROWS: Final = 2
"""A lone row takes another kernel."""
INPUT_GROUPS: Final = 4
"""Of a sum that is to have the same bits on 1, 2 and 4 shards."""
_PACKABLE: Final = frozenset({torch.float32, torch.bfloat16})
_EXACT_ROWS: Final = 16
_TYPICAL_ROWS: Final = 32
"""A hint for the layout; every number of rows is served."""


def padded_rows(rows: int) -> int:
    """How many rows to compute where so many are wanted: any number up to 16, from there on eight per power of two.

    The library compiles a product for every number of rows and keeps the code: prompts would have it keep hundreds of
    megabytes, and a step wait whenever its number is new.
    """
    step = 1 if rows <= _EXACT_ROWS else max(4, 1 << (rows.bit_length() - 4))
    return -(-rows // step) * step


def is_packable(weight: torch.Tensor) -> bool:
    """Whether products with `weight` are packed ones where the build and the processor have them."""
    return weight.device.type == "cpu" and weight.dtype in _PACKABLE and torch.backends.mkldnn.is_available()


def linear_map(weight: torch.Tensor, bias: torch.Tensor | None, *, quantization: Quantization = "none") -> Map:
    """x -> x @ weight.T + bias for x [rows, in]; weight [out, in]. With `int8` the weights are rounded to 8 bits.

    Raises:
        ModelError: `int8` is wanted in a dtype or on a device that it does not serve.
    """
    if quantization == "int8":
        return _int8_map(weight, bias)
    if is_packable(weight):
        try:
            return _packed_map(weight, bias)
        except (RuntimeError, AttributeError):  # this build or this processor has no packed product for the dtype
            pass
    return lambda rows: F.linear(rows, weight, bias)


def side_by_side(linears: Sequence[torch.nn.Linear], *, quantization: Quantization = "none") -> Map:
    """Layers that share an input, as one: their outputs follow each other along the last dimension."""
    weight = torch.cat([linear.weight for linear in linears])
    bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
    return linear_map(weight, bias, quantization=quantization)


def row_sharded_map(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shards: Shards,
    *,
    invariant: Literal["batch", "full"] = "batch",
    quantization: Quantization = "none",
) -> Map:
    """The whole product of a layer whose inputs are divided among shards; the bias is added once.

    Args:
        weight: [out, in] this shard's inputs.
        bias: [out] the same on every shard; None: none.
        shards: those that hold the other inputs.
        invariant: `full`: the same bits on 1, 2 and 4 shards.
        quantization: of the weights.

    Raises:
        ModelError: `full` is wanted and the inputs cannot be cut into `INPUT_GROUPS` groups that are alike.
    """
    if invariant == "batch":
        if shards.tensor == 1:
            return linear_map(weight, bias, quantization=quantization)
        partial = linear_map(weight, None, quantization=quantization)
    else:
        partial = _grouped_map(weight, _groups_held(weight, shards), quantization)
    if bias is None:
        return lambda rows: shards.sum(partial(rows))
    return lambda rows: shards.sum(partial(rows)) + bias


def _groups_held(weight: torch.Tensor, shards: Shards) -> int:
    held, left = divmod(INPUT_GROUPS, shards.tensor)
    if left or weight.shape[1] % held:
        raise ModelError(
            f"invariant arithmetic over shards cuts sums into {INPUT_GROUPS} equal groups: "
            f"{weight.shape[1] * shards.tensor} inputs on {shards.tensor} shards cannot be cut so"
        )
    return held


def _grouped_map(weight: torch.Tensor, groups: int, quantization: Quantization) -> Map:
    """The sum of `groups` products (1, 2 or 4) in a fixed tree."""
    size = weight.shape[1] // groups
    products = [linear_map(part.contiguous(), None, quantization=quantization) for part in weight.split(size, dim=1)]
    if len(products) == 1:
        return products[0]

    def apply(rows: torch.Tensor) -> torch.Tensor:
        parts = [product(part.contiguous()) for product, part in zip(products, rows.split(size, dim=-1), strict=True)]
        while len(parts) > 1:
            parts = [left.add_(right) for left, right in zip(parts[::2], parts[1::2], strict=True)]
        return parts[0]

    return apply


def _packed_map(weight: torch.Tensor, bias: torch.Tensor | None) -> Map:
    multiply = torch.ops.mkldnn._linear_pointwise.default
    packed = torch.ops.mkldnn._reorder_linear_weight.default(weight.contiguous(), _TYPICAL_ROWS)

    def apply(rows: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = multiply(rows, packed, bias, "none", [], "")
        return product

    apply(weight.new_zeros(LEAST_ROWS, weight.shape[1]))  # what cannot run fails here
    return apply


def _int8_map(weight: torch.Tensor, bias: torch.Tensor | None) -> Map:
    """Weights as 8-bit integers with a scale per output, largest magnitude to 127; the product is torch's own."""
    if weight.device.type != "cpu":
        raise ModelError("weights of 8 bits are served on processors: on a GPU set engine.quantization to 'none'")
    if weight.dtype != torch.bfloat16:
        raise ModelError(f"weights of 8 bits are served with bfloat16, not with {str(weight.dtype).removeprefix('torch.')}")
    scale = weight.float().abs().amax(dim=1).clamp(min=1e-12) / 127  # [out]
    scale = scale.to(weight.dtype)
    rounded = (weight.float() / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    multiply = torch.ops.aten._weight_int8pack_mm.default

    def apply(rows: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = multiply(rows, rounded, scale)
        return product if bias is None else product.add_(bias)

    return apply
