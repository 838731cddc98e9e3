"""Arithmetic on byte ranges against the plainest twin there is: sets of bytes, and arrays of them."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spotserve.core.errors import ModelError
from spotserve.engine.files.header import TensorPlace
from spotserve.engine.files.spans import check_spans, coalesce, cut_at_grid, part_ranges, subtract

ranges = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 12)).map(lambda pair: range(pair[0], pair[0] + pair[1])), max_size=8)


def bytes_of(spans: list[range]) -> set[int]:
    return {byte for span in spans for byte in span}


@given(ranges, st.integers(0, 5))
def test_coalesced_ranges_hold_all_and_only_small_gaps_more(spans: list[range], gap: int) -> None:
    union = coalesce(spans, gap)
    assert bytes_of(spans) <= bytes_of(union)
    assert all(len(span) for span in union)
    assert all(after.start - before.stop > gap for before, after in pairwise(union))
    if gap == 0:
        assert bytes_of(union) == bytes_of(spans)
    extra = coalesce([range(byte, byte + 1) for byte in bytes_of(union) - bytes_of(spans)], 0)
    assert all(len(each) <= gap for each in extra)


@given(ranges, ranges)
def test_subtraction_is_that_of_sets(wanted: list[range], present: list[range]) -> None:
    missing = subtract(coalesce(wanted, 0), coalesce(present, 0))
    assert bytes_of(missing) == bytes_of(wanted) - bytes_of(present)
    assert missing == coalesce(missing, 0)


@given(ranges, st.integers(1, 20))
def test_pieces_are_the_same_bytes_and_cross_no_line_of_the_grid(spans: list[range], grid: int) -> None:
    union = coalesce(spans, 0)
    pieces = cut_at_grid(union, grid)
    assert [byte for piece in pieces for byte in piece] == [byte for span in union for byte in span]
    assert all(piece.start // grid == (piece.stop - 1) // grid for piece in pieces)


@given(st.data())
def test_part_ranges_hold_the_part_and_little_else(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=3)))
    dtype = data.draw(st.sampled_from([torch.uint8, torch.float16, torch.float64]))
    dim = data.draw(st.integers(0, len(shape) - 1))
    ends = st.tuples(st.integers(0, shape[dim]), st.integers(0, shape[dim])).map(sorted)
    spans = [range(*pair) for pair in data.draw(st.lists(ends, max_size=3))]
    gap = data.draw(st.integers(0, 40))
    place = TensorPlace(dtype, shape, 100)
    found = part_ranges(place, dim, spans, gap)

    size = math.prod(shape) * dtype.itemsize
    where = np.arange(100, 100 + size).reshape(*shape, dtype.itemsize)
    wanted = {
        int(byte) for span in (spans or [range(shape[dim])]) for byte in where.take(np.arange(span.start, span.stop), dim).flat
    }
    assert wanted <= bytes_of(found) <= set(range(100, 100 + size))
    assert found == coalesce([range(byte, byte + 1) for byte in sorted(wanted)], gap)


def test_stripes_of_a_huge_matrix_are_not_listed_one_by_one() -> None:
    place = TensorPlace(torch.bfloat16, (2**40, 4096), 0)
    (span,) = part_ranges(place, 1, [range(2048)], 2**20)
    assert span == range((2**40 - 1) * 8192 + 4096)


@pytest.mark.parametrize(("dim", "span"), [(2, range(1)), (-1, range(1)), (0, range(5)), (1, range(-1, 1)), (1, range(4, 5))])
def test_indices_that_a_tensor_does_not_have_are_refused(dim: int, span: range) -> None:
    with pytest.raises(ModelError, match=r"m: tensor t has shape \[4, 3\]"):
        check_spans((4, 3), dim, [span], "m: tensor t")
