"""A request under way in a simulation: what its client has of it, and what it met."""

from dataclasses import dataclass
from math import inf

from spotserve.replay.outcome import Gaps, Outcome


@dataclass(slots=True, eq=False)
class Call:
    """One request. The batch that has it counts its tokens; `emitted` is up to date when no batch has it."""

    index: int
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    prefix: tuple[int, ...] = ()
    """Blocks of its prompt that others may begin with as well."""
    emitted: int = 0
    """Output tokens that its client has."""
    first_token_s: float = inf
    last_token_s: float = inf
    longest_gap_s: float = 0.0
    longest_gap_end_s: float = 0.0
    moved: int = 0
    resumed: int = 0
    restarted: int = 0
    recomputed_tokens: int = 0
    known_tokens: int = 0
    """Tokens whose KV somebody had computed: computing them again is extra work."""
    replica_id: str | None = None
    """Who has it; None: it waits at the gateway, or is on its way."""
    prefer: str | None = None
    """Who should have it next, if they can."""
    begun: int = -1
    """Iteration of its batch after which it is in every one; -1: its prompt is not computed."""
    base: int = 0
    """Tokens that it had then."""
    order: int = -1
    """Number of its admission."""
    is_held: bool = False
    """Whether it has a slot and KV in its batch."""

    @property
    def context_tokens(self) -> int:
        """Prompt and the output that the client has."""
        return self.prompt_tokens + self.emitted

    @property
    def is_resumed(self) -> bool:
        """Whether another owner emitted tokens of it."""
        return self.moved + self.resumed > 0

    def release(self) -> None:
        """It has no slot any more."""
        self.is_held, self.begun, self.order = False, -1, -1

    def begin_anew(self) -> None:
        """What its client has is thrown away, as when a client sends a request again."""
        self.restarted += 1
        self.emitted = 0

    def gain(self, at_s: float, gaps: Gaps) -> None:
        """One token comes that no iteration has told of: the first one, or the first one at a new owner."""
        if self.emitted == 0:
            self.first_token_s = at_s
        else:
            gaps.add(at_s - self.last_token_s)
            self.note_gap(at_s - self.last_token_s, at_s)
        self.emitted += 1
        self.last_token_s = at_s

    def note_gap(self, gap_s: float, end_s: float) -> None:
        """Its client has waited so long for a token that came at `end_s`."""
        if gap_s > self.longest_gap_s:
            self.longest_gap_s, self.longest_gap_end_s = gap_s, end_s

    def outcome(self, end_s: float, *, start_s: float = 0.0) -> Outcome:
        """What became of it, on a clock that begins at `start_s`; it is whole when the client has all tokens."""
        return Outcome(
            index=self.index,
            arrival_s=self.arrival_s - start_s,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            first_token_s=None if self.first_token_s == inf else self.first_token_s - start_s,
            end_s=end_s - start_s,
            is_whole=self.emitted >= self.output_tokens,
            tokens=self.emitted,
            longest_gap_s=self.longest_gap_s,
            longest_gap_end_s=max(0.0, self.longest_gap_end_s - start_s),
            moved=self.moved,
            resumed=self.resumed,
            restarted=self.restarted,
            recomputed_tokens=self.recomputed_tokens,
        )


def seniority(call: Call) -> tuple[float, int]:
    """Place in line, as in `engine.sequence`: who came to the gateway first."""
    return (call.arrival_s, call.index)
