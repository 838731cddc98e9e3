"""A guess at how one sequence goes on: a tree of draft tokens below its last token.

A chain is a tree, and the empty tree is plain decoding. Parents come before children, so that walking the nodes in order never
looks ahead. Knows token ids; does not know where they came from.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

ROOT: Final = -1
"""Parent of the first draft tokens: the last token that the sequence has."""


@cache
def _chain_parents(length: int) -> tuple[int, ...]:
    """Of a chain with so many nodes; built once, as every step drafts many chains."""
    return tuple(range(ROOT, length - 1))


@cache
def _chain_depths(length: int) -> tuple[int, ...]:
    return tuple(range(1, length + 1))


@dataclass(frozen=True, slots=True)
class DraftTree:
    """`parents[i]` is the node before node i, or `ROOT`."""

    token_ids: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        assert self.parents == _chain_parents(len(self.token_ids)) or (
            len(self.token_ids) == len(self.parents) and all(ROOT <= parent < node for node, parent in enumerate(self.parents))
        )

    def __len__(self) -> int:
        return len(self.token_ids)

    @classmethod
    def chain(cls, token_ids: Sequence[int]) -> "DraftTree":
        """One guess without alternatives."""
        return cls(tuple(token_ids), _chain_parents(len(token_ids)))

    @property
    def is_chain(self) -> bool:
        """Whether every node follows the one before it."""
        return self.parents == _chain_parents(len(self.parents))

    def path(self, node: int) -> tuple[int, ...]:
        """Nodes from below the root to `node`, both included; empty for `ROOT`."""
        nodes = []
        while node != ROOT:
            nodes.append(node)
            node = self.parents[node]
        return tuple(reversed(nodes))

    def path_token_ids(self, node: int) -> tuple[int, ...]:
        """Token ids along `path(node)`."""
        return tuple(self.token_ids[ancestor] for ancestor in self.path(node))

    @property
    def trunk(self) -> int:
        """How many of the first nodes follow each other: all of a chain, 1 at least of any tree but the empty one."""
        if self.is_chain:
            return len(self)
        return next(node for node, parent in enumerate(self.parents) if parent != node - 1)

    def depths(self) -> tuple[int, ...]:
        """Per node how many nodes its path has."""
        if self.is_chain:
            return _chain_depths(len(self))
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent == ROOT else depths[parent] + 1)
        return tuple(depths)

    def cut(self, max_nodes: int) -> "DraftTree":
        """The first `max_nodes` nodes: still a tree, as parents come first."""
        return self if len(self) <= max_nodes else DraftTree(self.token_ids[:max_nodes], self.parents[:max_nodes])

    def keep(self, nodes: Sequence[int]) -> "DraftTree":
        """These nodes alone, ascending, each with its parent among them."""
        if len(nodes) == len(self):
            return self
        place = {node: index for index, node in enumerate(nodes)}
        place[ROOT] = ROOT
        return DraftTree(tuple(self.token_ids[node] for node in nodes), tuple(place[self.parents[node]] for node in nodes))


EMPTY_TREE: Final = DraftTree()
"""No guess."""
