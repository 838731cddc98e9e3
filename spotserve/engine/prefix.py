"""What blocks of the KV cache hold, so that sequences that begin alike can share them.

KV of a token depends on the tokens before it, so a block is known by everything up to its end: a `Prefix` is a chain of full
blocks of token ids under a salt, named by a chained hash. Hashes only find candidates; a block is shared when the token ids of
the whole chain are the same, so a collision costs a lookup and never an answer. Published blocks that no sequence holds rest
here until somebody begins alike or space is short: the one that has rested longest goes first.

Invariants: a prefix has one block and a block one prefix; what rests is published. Knows no tensors, no requests and no counts
of holders.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Final

_DIGEST_BYTES: Final = 16


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """Token ids from the start of a sequence to the end of one of its blocks."""

    digest: bytes
    """Of the parent's digest and `token_ids`; of the salt where there is no parent."""
    parent: "Prefix | None" = None
    """Everything before the last block; None: this is the empty prefix."""
    token_ids: tuple[int, ...] = ()
    """Of the last block."""
    salt: str = ""
    """Of the empty prefix: prefixes under different salts are never the same."""

    @classmethod
    def empty(cls, salt: str) -> "Prefix":
        """What every sequence of this salt begins with."""
        return cls(blake2b(salt.encode(), digest_size=_DIGEST_BYTES).digest(), salt=salt)

    def extended(self, token_ids: Sequence[int]) -> "Prefix":
        """This prefix and one more block."""
        digest = blake2b(array("q", token_ids).tobytes(), digest_size=_DIGEST_BYTES, key=self.digest).digest()
        return Prefix(digest, self, tuple(token_ids))

    def same(self, other: "Prefix") -> bool:
        """Whether salt and token ids are the same from the start; short where the two chains share their parents."""
        mine: Prefix | None = self
        theirs: Prefix | None = other
        while mine is not theirs:
            if mine is None or theirs is None or mine.token_ids != theirs.token_ids or mine.salt != theirs.salt:
                return False
            mine, theirs = mine.parent, theirs.parent
        return True


@dataclass(slots=True)
class PrefixChain:
    """The prefixes of one sequence, hashed when they are first asked for.

    Reads `token_ids`, which its owner only ever appends to.
    """

    token_ids: list[int]
    block_tokens: int
    salt: str = ""
    _known: list[Prefix] = field(default_factory=list)

    def at(self, index: int) -> Prefix:
        """The prefix that ends with the full block `index`."""
        assert (index + 1) * self.block_tokens <= len(self.token_ids), "the block is not full"
        while len(self._known) <= index:
            start = len(self._known) * self.block_tokens
            parent = self._known[-1] if self._known else Prefix.empty(self.salt)
            self._known.append(parent.extended(self.token_ids[start : start + self.block_tokens]))
        return self._known[index]

    def put(self, index: int, prefix: Prefix) -> None:
        """Goes on from `prefix`, which is the same as `at(index)`: chains that share their parents are compared in one step."""
        if self._known[index] is not prefix:
            self._known[index] = prefix
            del self._known[index + 1 :]


class PublishedBlocks:
    """Which block holds which prefix, and which of these blocks rest."""

    def __init__(self) -> None:
        self._prefixes: dict[int, Prefix] = {}
        self._blocks: dict[bytes, int] = {}
        self._resting: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, block_id: int) -> bool:
        return block_id in self._prefixes

    @property
    def resting(self) -> tuple[int, ...]:
        """Blocks that nobody holds, the next to go first."""
        return tuple(self._resting)

    @property
    def num_resting(self) -> int:
        """How many blocks nobody holds."""
        return len(self._resting)

    def find(self, prefix: Prefix) -> tuple[int, Prefix] | None:
        """The block that holds `prefix`, and the chain under which it was published."""
        block_id = self._blocks.get(prefix.digest)
        if block_id is None or not self._prefixes[block_id].same(prefix):
            return None
        return block_id, self._prefixes[block_id]

    def publish(self, block_id: int, prefix: Prefix) -> Prefix:
        """Offers a block that somebody holds; where the prefix has a block, or its hash a prefix, that one stays.

        Returns the chain to go on from: the one that was there when it is the same.
        """
        assert block_id not in self._prefixes
        before = self._blocks.setdefault(prefix.digest, block_id)
        if before == block_id:
            self._prefixes[block_id] = prefix
            return prefix
        return self._prefixes[before] if self._prefixes[before].same(prefix) else prefix

    def rest(self, block_id: int) -> None:
        """The last holder of a published block is gone."""
        assert block_id in self._prefixes and block_id not in self._resting
        self._resting[block_id] = None

    def wake(self, block_id: int) -> None:
        """A published block that may rest has a holder."""
        self._resting.pop(block_id, None)

    def withdraw_oldest(self) -> int:
        """Gives up the block that has rested longest."""
        block_id, _ = self._resting.popitem(last=False)
        del self._blocks[self._prefixes.pop(block_id).digest]
        return block_id

    def check_integrity(self) -> None:
        """Asserts the invariants."""
        assert {prefix.digest: block_id for block_id, prefix in self._prefixes.items()} == self._blocks, "a prefix has two blocks"
        assert self._resting.keys() <= self._prefixes.keys(), "a block rests and is not published"
