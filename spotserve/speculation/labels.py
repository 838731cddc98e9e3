"""What became of drafts, whether or not they were verified: the tokens that a sequence gets label what was drafted for it.

A draft is compared with the tokens that follow, over as many steps as it takes: so a draft of which only a part was verified, or
nothing, teaches as far as the sequence follows it and one token further. Estimates thus go on learning while speculation is off,
which is what a rule that learns from verified drafts alone cannot (TurboSpec's released one stays off for good).
"""

from collections.abc import Sequence

from spotserve.speculation.acceptance import Label
from spotserve.speculation.tree import ROOT, DraftTree


class DraftLabeller:
    """One draft on its way to its end."""

    __slots__ = ("_at", "_cells", "_is_chain", "_tree", "is_new", "is_over")

    def __init__(self, tree: DraftTree, cells: Sequence[int]) -> None:
        """`cells`: what each node is counted under."""
        self._tree = tree
        self._cells = cells
        self._is_chain = tree.is_chain
        self._at = ROOT
        self.is_over = not tree
        """Whether it can teach nothing more: the sequence has left it, or come to its end."""
        self.is_new = True
        """Whether no token was held against it yet."""

    def follow(self, token_ids: Sequence[int]) -> list[Label]:
        """Takes the next tokens of the sequence."""
        labels: list[Label] = []
        for token_id in token_ids:
            if self.is_over:
                break
            said = None
            for node in self._children():
                accepted = self._tree.token_ids[node] == token_id
                labels.append(Label(self._cells[node], accepted))
                if accepted:
                    said = node
            if said is not None:
                self._at = said
            self.is_over = said is None or not self._children()
        self.is_new = False
        return labels

    def _children(self) -> Sequence[int]:
        """Nodes after the one that the sequence has come to."""
        num_nodes = len(self._tree)
        if self._is_chain:
            return range(self._at + 1, min(self._at + 2, num_nodes))
        return [node for node in range(self._at + 1, num_nodes) if self._tree.parents[node] == self._at]
