"""Which things hang together because they share something: connected components by union-find.

The conflict-free groups of CYCLADES (NeurIPS'16, arXiv 1605.09721): what shares nothing needs no common order. A whole migration
is usually one group, so groups are not a way to run it; they keep the cost of scheduling independent parts that of each part.
"""

from collections.abc import Hashable, Iterable, Sequence


def groups(keys: Sequence[Iterable[Hashable]]) -> list[list[int]]:
    """Indices of `keys` in groups: two are in one group when they have a key in common, or both share one with a third.

    Groups are ordered by their first index, and so are the indices in them.
    """
    parent = list(range(len(keys)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    owner: dict[Hashable, int] = {}
    for index, some in enumerate(keys):
        for key in some:
            one, other = root(owner.setdefault(key, index)), root(index)
            parent[max(one, other)] = min(one, other)
    found: dict[int, list[int]] = {}
    for index in range(len(keys)):
        found.setdefault(root(index), []).append(index)
    return list(found.values())
