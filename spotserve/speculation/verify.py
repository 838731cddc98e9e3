"""Which of a tree's tokens the target would have said itself.

Every node was given to the target, which answered with its own next token after that node's prefix. A draft token is accepted
exactly when it equals the target's token there; the first one that no node carries ends the walk and is kept as well. The
result is thus what plain decoding emits, token for token, whatever the tree: there is nothing to reject by chance.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from spotserve.speculation.tree import ROOT, DraftTree


@dataclass(frozen=True, slots=True)
class Acceptance:
    """The target's tokens, one more than accepted nodes. `nodes[i]` carries `token_ids[i]`."""

    token_ids: tuple[int, ...]
    nodes: tuple[int, ...]

    @property
    def rows(self) -> tuple[int, ...]:
        """The node after which the target said each token, `ROOT` first."""
        return (ROOT, *self.nodes)


def accept(tree: DraftTree, *, root_token_id: int, node_token_ids: Sequence[int]) -> Acceptance:
    """Walks `tree` along the target's own tokens.

    Args:
        tree: the draft.
        root_token_id: the target's token after the sequence as it stands.
        node_token_ids: the target's token after each node.
    """
    assert len(node_token_ids) == len(tree)
    token_ids, nodes, at = [root_token_id], [], ROOT
    for node, parent in enumerate(tree.parents):  # children come after parents: one pass finds the whole path
        if parent == at and tree.token_ids[node] == token_ids[-1]:
            at = node
            nodes.append(node)
            token_ids.append(node_token_ids[node])
    return Acceptance(tuple(token_ids), tuple(nodes))
