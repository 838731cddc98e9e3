"""One sequence while it is being made: the only mutable thing that scheduler, runner and engine share.

Invariant: KV of the first `computed_tokens` of `token_ids` is in the cache, in the blocks of `block_ids`, when the next step runs;
a running sequence has at least one token that is not computed. Knows nothing of tensors.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TypeAlias

from spotserve.core.request import Request
from spotserve.engine.prefix import PrefixChain

Seniority: TypeAlias = tuple[int, float, int]
"""The request's priority, when the gateway accepted it, then the order in which it came here: among equally urgent ones a sequence
that was interrupted elsewhere keeps its place in line, because its client has waited longest."""


@dataclass(slots=True, eq=False)
class Sequence:
    """A request and how far it has come."""

    request: Request
    seniority: Seniority
    """The smallest is served first and evicted last."""
    token_ids: list[int]
    """Prompt and output so far."""
    banned_token_ids: tuple[int, ...]
    """What `min_tokens` forbids: the ids that end text."""
    stop_token_ids: frozenset[int]
    """What ends this sequence."""
    computed_tokens: int = 0
    block_ids: list[int] = field(default_factory=list)
    recompute_until: int = 0
    """Tokens below this were computed before and lost."""
    recomputed_tokens: int = 0
    """Of those, how many were computed again since the last output."""
    resumed: bool = False
    """Whether another owner emitted tokens of it: a client is in the middle of an answer."""
    cache_salt: str = ""
    """Sequences share KV only with sequences of the same salt."""
    cached_tokens: int = 0
    """Tokens whose KV was found in the prefix cache when the sequence was last admitted."""
    unreported_cached_tokens: int = 0
    """Tokens found in the prefix cache since the last output."""
    published_blocks: int = 0
    """Blocks, from the first on, that were offered to the prefix cache or taken from it; the scheduler's."""
    last_step: int = -1
    """Number of the step in which it was last scheduled; the scheduler's."""
    _prefixes: PrefixChain | None = None

    @property
    def request_id(self) -> str:
        """Identity of the request."""
        return self.request.request_id

    @property
    def output_tokens(self) -> int:
        """Output tokens so far."""
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    @property
    def pending_tokens(self) -> int:
        """Known tokens that are not computed; 1 while decoding."""
        return len(self.token_ids) - self.computed_tokens

    @property
    def remaining_tokens(self) -> int:
        """Output tokens that may still come by `max_tokens`."""
        return self.request.sampling.max_tokens - self.output_tokens

    def advance(self, num_tokens: int) -> None:
        """KV of the next `num_tokens` known tokens is computed."""
        assert 0 <= num_tokens <= self.pending_tokens
        again = min(self.recompute_until, self.computed_tokens + num_tokens) - self.computed_tokens
        self.recomputed_tokens += max(0, again)
        self.computed_tokens += num_tokens

    def prefixes(self, block_tokens: int) -> PrefixChain:
        """Names of its full blocks."""
        if self._prefixes is None:
            self._prefixes = PrefixChain(self.token_ids, block_tokens, self.cache_salt)
        return self._prefixes

    def find_cached(self, num_tokens: int) -> None:
        """KV of the first `num_tokens` was there already: nothing of it is computed, or computed again."""
        assert self.computed_tokens == 0 and num_tokens < len(self.token_ids), "one token at least has to be computed"
        self.computed_tokens = self.cached_tokens = num_tokens
        self.unreported_cached_tokens += num_tokens

    def lose_cache(self) -> None:
        """KV is gone: tokens that nobody else has kept have to be computed again."""
        self.recompute_until = max(self.recompute_until, self.computed_tokens)
        self.computed_tokens = self.cached_tokens = 0

    def take_cached_tokens(self) -> int:
        """Tokens found in the prefix cache since this was last asked; counted once."""
        count, self.unreported_cached_tokens = self.unreported_cached_tokens, 0
        return count

    def take_recomputed_tokens(self) -> int:
        """Tokens computed again since this was last asked; counted once."""
        count, self.recomputed_tokens = self.recomputed_tokens, 0
        return count


def seniority_of(request: Request, count: int) -> Seniority:
    """Place in line of the `count`-th request that came here."""
    return (request.priority, request.arrival_s, count)


def new_sequence(
    request: Request,
    *,
    seniority: Seniority,
    end_token_ids: Collection[int],
    emitted_token_ids: tuple[int, ...],
    cache_salt: str = "",
) -> Sequence:
    """A sequence that goes on after `emitted_token_ids`, which another owner computed and emitted."""
    sampling = request.sampling
    token_ids = [*request.prompt_token_ids, *emitted_token_ids]
    ends = frozenset(sampling.stop_token_ids)
    return Sequence(
        request=request,
        seniority=seniority,
        token_ids=token_ids,
        banned_token_ids=tuple(sorted(ends | frozenset(end_token_ids))),
        stop_token_ids=ends if sampling.ignore_eos else ends | frozenset(end_token_ids),
        recompute_until=len(token_ids) if emitted_token_ids else 0,
        resumed=bool(emitted_token_ids),
        cache_salt=cache_salt,
    )
