"""A guess at how one sequence goes on: a tree of draft tokens below its last token.

A chain is a tree, and the empty tree is plain decoding. Parents come before children, so that walking the nodes in order never
looks ahead. Knows token ids; does not know where they came from.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

ROOT: Final = -1
"""Parent of the first draft tokens: the last token that the sequence has."""


@dataclass(frozen=True, slots=True)
class DraftTree:
    """`parents[i]` is the node before node i, or `ROOT`."""

    token_ids: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        assert len(self.token_ids) == len(self.parents)
        assert all(ROOT <= parent < node for node, parent in enumerate(self.parents))

    def __len__(self) -> int:
        return len(self.token_ids)

    @classmethod
    def chain(cls, token_ids: Sequence[int]) -> "DraftTree":
        """One guess without alternatives."""
        return cls(tuple(token_ids), tuple(range(ROOT, len(token_ids) - 1)))

    @property
    def is_chain(self) -> bool:
        """Whether every node follows the one before it."""
        return all(parent == node - 1 for node, parent in enumerate(self.parents))

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

    def cut(self, max_nodes: int) -> "DraftTree":
        """The first `max_nodes` nodes: still a tree, as parents come first."""
        return self if len(self) <= max_nodes else DraftTree(self.token_ids[:max_nodes], self.parents[:max_nodes])


EMPTY_TREE: Final = DraftTree()
"""No guess."""
