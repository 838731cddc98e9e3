"""Policy `spotserve-2024`: Kuhn-Munkres as SpotServe's artifact runs it. A baseline; this project places with `migration.matching`.

Many matchings are equally heavy, since copies of a stage are alike, and the makespan depends on which of them is taken. So the
text-book algorithm (Kuhn 1955, Munkres 1957, in the form with slacks, O(n^3)) is run in the order of `KMmatcher.py` of the artifact
(github.com/Hsword/SpotServe, branch artifact, 832b29f): rows and columns by number, breadth first, equal within the tolerance of
`numpy.isclose`. One peculiarity is kept: after labels change, the row that a column leads to is not searched itself, it only
lowers the slacks; the row before it is searched once more.

Invariant: every row has a column of its own, and the sum is the greatest but for that tolerance.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

_Floats = npt.NDArray[np.float64]
_FREE = -1


def heaviest(weights: _Floats) -> list[tuple[int, int]]:
    """(row, column) pairs with the greatest sum; as many as there are of the fewer of rows and columns, in order of those."""
    if weights.shape[0] > weights.shape[1]:
        return [(row, column) for column, row in heaviest(weights.T)]
    matching = _Matching.empty(weights)
    for row in range(len(weights)):
        _Tree(matching, row).augment()
    return [(row, int(column)) for row, column in enumerate(matching.column_of)]


@dataclass(slots=True)
class _Matching:
    weights: _Floats
    row_labels: _Floats
    column_labels: _Floats
    """A label of a row and one of a column together are never less than the weight of the two."""
    column_of: npt.NDArray[np.int64]
    row_of: npt.NDArray[np.int64]

    @classmethod
    def empty(cls, weights: _Floats) -> "_Matching":
        rows, columns = weights.shape
        return cls(weights, weights.max(axis=1), np.zeros(columns), np.full(rows, _FREE), np.full(columns, _FREE))


@dataclass(slots=True)
class _Tree:
    """Alternating paths from one row that has no column yet."""

    matching: _Matching
    root: int
    before: dict[int, int] = field(default_factory=dict)
    """The row before each row in the tree."""
    seen: npt.NDArray[np.bool_] = field(init=False)
    """Columns in the tree."""
    slack: _Floats = field(init=False)
    """By how much labels have to sink until a column can be reached."""
    nearest: npt.NDArray[np.int64] = field(init=False)
    """The row that a column would be reached from."""

    def __post_init__(self) -> None:
        columns = self.matching.weights.shape[1]
        self.seen = np.zeros(columns, dtype=np.bool_)
        self.slack = np.full(columns, np.inf)
        self.nearest = np.full(columns, self.root)
        self._add(self.root, _FREE)

    def augment(self) -> None:
        """Gives the root a column; rows on the way change theirs."""
        row, column = self._end_of_path()
        matching = self.matching
        while row != _FREE:
            matching.row_of[column] = row
            column, matching.column_of[row] = matching.column_of[row], column
            row = self.before[row]

    def _end_of_path(self) -> tuple[int, int]:
        """The last row, and the free column, of a path from the root."""
        queue = [self.root]
        while True:
            for row in queue:  # which grows
                for column in self._tight(row):
                    if (taken_by := int(self.matching.row_of[column])) == _FREE:
                        return row, column
                    self.seen[column] = True
                    queue.append(taken_by)
                    self._add(taken_by, row)
            self._relabel()
            queue = []
            for column in np.flatnonzero(np.isclose(self.slack, 0) & ~self.seen).tolist():
                row = int(self.nearest[column])
                if (taken_by := int(self.matching.row_of[column])) == _FREE:
                    return row, column
                self.seen[column] = True
                if taken_by not in self.before:
                    queue.append(row)
                    self._add(taken_by, row)

    def _tight(self, row: int) -> list[int]:
        """Columns outside the tree that can be reached from a row as labels are."""
        matching = self.matching
        tight = np.isclose(matching.weights[row], matching.row_labels[row] + matching.column_labels) & ~self.seen
        return [int(column) for column in np.flatnonzero(tight)]

    def _add(self, row: int, before: int) -> None:
        matching = self.matching
        self.before[row] = before
        slack = matching.row_labels[row] + matching.column_labels - matching.weights[row]
        nearer = slack < self.slack
        self.slack = np.where(nearer, slack, self.slack)
        self.nearest = np.where(nearer, row, self.nearest)

    def _relabel(self) -> None:
        """Until the next column can be reached."""
        matching = self.matching
        delta = self.slack[~self.seen].min()
        matching.row_labels[list(self.before)] -= delta
        matching.column_labels[self.seen] += delta
        self.slack[~self.seen] -= delta
