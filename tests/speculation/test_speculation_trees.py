"""Trees and their verification against brute force."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotserve.speculation.tree import EMPTY_TREE, ROOT, DraftTree
from spotserve.speculation.verify import accept


@st.composite
def trees(draw: st.DrawFn) -> DraftTree:
    size = draw(st.integers(0, 12))
    parents = tuple(draw(st.integers(ROOT, node - 1)) for node in range(size))
    return DraftTree(tuple(draw(st.integers(0, 2)) for _ in range(size)), parents)


def target(prefix: tuple[int, ...], salt: int) -> int:
    """Some function of the prefix: what plain decoding would say after it."""
    return hash((prefix, salt)) % 3


@given(tree=trees(), salt=st.integers(0, 1000))
def test_acceptance_is_plain_decoding_cut_where_the_tree_ends(tree: DraftTree, salt: int) -> None:
    plain: tuple[int, ...] = ()
    for _ in range(len(tree) + 1):
        plain += (target(plain, salt),)
    paths = {tree.path_token_ids(node) for node in range(len(tree))} | {()}
    longest = max(length for length in range(len(plain)) if plain[:length] in paths)
    accepted = accept(
        tree,
        root_token_id=target((), salt),
        node_token_ids=[target(tree.path_token_ids(node), salt) for node in range(len(tree))],
    )
    prefix = accepted.token_ids[:-1]
    assert accepted.token_ids == plain[: len(accepted.token_ids)], "speculation changed the answer"
    assert tuple(tree.token_ids[node] for node in accepted.nodes) == prefix
    assert tree.path(accepted.nodes[-1]) == accepted.nodes if accepted.nodes else True
    duplicates = len({(parent, token) for parent, token in zip(tree.parents, tree.token_ids, strict=True)}) < len(tree)
    assert duplicates or len(prefix) == longest, "an equal token was refused"


def test_chain() -> None:
    chain = DraftTree.chain([4, 5, 6])
    assert chain.is_chain
    assert chain.path(2) == (0, 1, 2)
    assert accept(chain, root_token_id=4, node_token_ids=[5, 9, 1]).token_ids == (4, 5, 9)
    assert accept(chain, root_token_id=8, node_token_ids=[5, 9, 1]).token_ids == (8,)
    assert accept(EMPTY_TREE, root_token_id=8, node_token_ids=[]).rows == (ROOT,)


def test_the_right_branch_is_found() -> None:
    tree = DraftTree((1, 2, 3, 4), (ROOT, ROOT, 1, 1))
    accepted = accept(tree, root_token_id=2, node_token_ids=[0, 4, 0, 7])
    assert accepted.token_ids == (2, 4, 7)
    assert accepted.nodes == (1, 3)
    assert accepted.rows == (ROOT, 1, 3)
    assert not tree.is_chain
    assert tree.cut(2) == DraftTree((1, 2), (ROOT, ROOT))


def test_parents_come_first() -> None:
    with pytest.raises(AssertionError):
        DraftTree((1, 2), (1, ROOT))
