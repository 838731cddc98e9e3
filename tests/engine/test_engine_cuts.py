"""Parts of tensors, against the plainest way to say them: a list of rows, each with its segment and unit."""

from collections.abc import Sequence

import torch
from hypothesis import given
from hypothesis import strategies as st

from spotserve.engine.cuts import Segment, TensorCut, overlap

TENSORS = (1, 2, 4)


@st.composite
def cuts(draw: st.DrawFn) -> TensorCut:
    segments = draw(st.lists(st.builds(Segment, st.sampled_from((1, 2, 4, 8)), st.integers(1, 3)), min_size=1, max_size=3))
    return TensorCut(draw(st.integers(0, 2)), tuple(segments))


def rows_of(cut: TensorCut, held: Sequence[range]) -> list[tuple[int, int, int]]:
    """(segment, unit, row in the unit) of each index along the dimension of the cut."""
    return [
        (number, unit, row)
        for number, (segment, units) in enumerate(zip(cut.segments, held, strict=True))
        for unit in units
        for row in range(segment.unit_size)
    ]


def tensor_of(cut: TensorCut, held: Sequence[range]) -> torch.Tensor:
    """A tensor whose values along the cut say which row it is."""
    rows = rows_of(cut, held)
    values = torch.tensor([100 * number + 10 * unit + row for number, unit, row in rows])
    shape = [2, 2, 2]
    shape[cut.dim] = len(rows)
    return values.view([len(rows) if dim == cut.dim else 1 for dim in range(3)]).expand(shape).contiguous()


@given(cuts(), st.sampled_from(TENSORS), st.data())
def test_a_shards_part_out_of_the_whole(cut: TensorCut, tensor: int, data: st.DataObject) -> None:
    held = cut.held(tensor, data.draw(st.integers(0, tensor - 1)))
    whole = tensor_of(cut, cut.whole)
    assert torch.equal(cut.cut_out(whole, cut.whole, held), tensor_of(cut, held))
    indices = [index for span in cut.spans(cut.whole, held) for index in span]
    assert [rows_of(cut, cut.whole)[index] for index in indices] == rows_of(cut, held)
    assert cut.size(held) == len(indices)


@given(cuts(), st.sampled_from(TENSORS), st.data())
def test_parts_of_a_shards_part(cut: TensorCut, tensor: int, data: st.DataObject) -> None:
    held = cut.held(tensor, data.draw(st.integers(0, tensor - 1)))
    wanted = []
    for units in held:
        start = data.draw(st.integers(units.start, units.stop))
        wanted.append(range(start, data.draw(st.integers(start, units.stop))))
    views = cut.take(tensor_of(cut, held), held, wanted)
    expected = tensor_of(cut, wanted)
    assert torch.equal(torch.cat(views, dim=cut.dim) if views else expected, expected)
    assert [index for span in cut.spans(held, wanted) for index in span] == [
        index for index, row in enumerate(rows_of(cut, held)) if row in set(rows_of(cut, wanted))
    ]


@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9), st.integers(0, 9))
def test_overlap(first: int, first_length: int, second: int, second_length: int) -> None:
    ours, theirs = range(first, first + first_length), range(second, second + second_length)
    assert list(overlap(ours, theirs)) == sorted(set(ours) & set(theirs))


def test_the_shards_of_a_cut_hold_every_unit() -> None:
    cut = TensorCut(0, (Segment(8, 4), Segment(2, 4)))
    for tensor in (1, 2, 4, 8):
        held = [cut.held(tensor, shard) for shard in range(tensor)]
        for number, units in enumerate(cut.whole):
            assert sorted({unit for part in held for unit in part[number]}) == list(units)
