"""Linear layers: the same bits for a row and a column whatever is computed with them, and for a sum wherever it is cut."""

import pytest
import torch

from spotserve.core.errors import ModelError
from spotserve.engine.linear import LEAST_ROWS, linear_map, row_sharded_map, side_by_side
from spotserve.engine.shards import Shards
from spotserve.engine.thread_shards import run_shards, thread_shards

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch cannot pack weights")

SHAPES = [(48, 32), (512, 256), (256, 768), (1152, 896), (896, 4864)]
"""(outputs, inputs): a tiny model, the one that ships, Qwen2.5-0.5B."""
DTYPES = [torch.float32, torch.bfloat16]


def random_layer(shape: tuple[int, int], dtype: torch.dtype, rows: int = 70) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight, bias and input."""
    torch.manual_seed(sum(shape))
    outputs, inputs = shape
    return (0.05 * torch.randn(shape)).to(dtype), torch.randn(outputs).to(dtype), torch.randn(rows, inputs).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.inference_mode()
def test_rows_and_columns_do_not_depend_on_each_other(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, bias, rows = random_layer(shape, dtype)
    whole = linear_map(weight, bias)(rows)
    assert torch.allclose(whole.float(), torch.nn.functional.linear(rows, weight, bias).float(), rtol=0.02, atol=1e-4 * shape[1])
    for count in (LEAST_ROWS, 3, 4, 5, 7, 16, 33, 64):
        start = 70 - count
        assert torch.equal(linear_map(weight, bias)(rows[start:]), whole[start:])
    for parts in (2, 4):
        pieces = [linear_map(w.contiguous(), b)(rows) for w, b in zip(weight.chunk(parts), bias.chunk(parts), strict=True)]
        assert torch.equal(torch.cat(pieces, dim=-1), whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.inference_mode()
def test_full_invariance_sums_alike_on_any_number_of_shards(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, bias, rows = random_layer(shape, dtype)
    results = []
    for tensor in (1, 2, 4):

        def work(shards: Shards, tensor: int = tensor) -> torch.Tensor:
            own_weight, own_rows = (whole.chunk(tensor, dim=1)[shards.shard].contiguous() for whole in (weight, rows))
            return row_sharded_map(own_weight, bias, shards, invariant="full")(own_rows)

        results += run_shards(thread_shards(tensor), work)
    assert all(torch.equal(result, results[0]) for result in results)
    exact = rows.double() @ weight.double().T + bias.double()
    assert (results[0].double() - exact).abs().max() < 8 * torch.finfo(dtype).eps * exact.abs().max()


def test_what_cannot_be_cut_into_equal_groups_is_refused() -> None:
    with pytest.raises(ModelError, match="4 equal groups"):
        row_sharded_map(torch.zeros(8, 8), None, thread_shards(3)[0], invariant="full")
    with pytest.raises(ModelError, match="6 inputs on 1 shards"):
        row_sharded_map(torch.zeros(8, 6), None, thread_shards(1)[0], invariant="full")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.inference_mode()
def test_weights_of_8_bits_are_off_by_half_a_step_at_most(shape: tuple[int, int]) -> None:
    weight, bias, rows = random_layer(shape, torch.bfloat16)
    got = linear_map(weight, bias, quantization="int8")(rows).double()
    exact = rows.double() @ weight.double().T + bias.double()
    # Largest magnitude / 127 is a step; the scale itself is a bfloat16 and off by one part in 256 at most.
    step = weight.double().abs().amax(dim=1) / 127 * (1 + 2**-8)
    bound = rows.double().abs().sum(dim=1, keepdim=True) * step / 2
    assert (got - exact).abs().max() > 0, "nothing was rounded"
    assert ((got - exact).abs() <= bound + 2**-7 * (exact.abs() + bias.double().abs())).all()
    assert torch.equal(linear_map(weight, bias, quantization="int8")(rows[:3]).double(), got[:3])


def test_weights_of_8_bits_want_bfloat16() -> None:
    with pytest.raises(ModelError, match="bfloat16, not with float32"):
        linear_map(torch.zeros(4, 4, dtype=torch.float32), None, quantization="int8")


@torch.inference_mode()
def test_layers_side_by_side_are_those_layers() -> None:
    layers = [torch.nn.Linear(32, width) for width in (48, 16, 16)]
    rows = torch.randn(5, 32)
    together = side_by_side(layers)(rows)
    assert torch.allclose(together, torch.cat([layer(rows) for layer in layers], dim=-1), atol=1e-5)
