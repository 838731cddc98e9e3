"""A replica that drafts: whether a drafter is worth its memory there, and how fast the replica is with it.

`speculation.advisor` decides; here a `ReplicaSpeed` stands for the target. A step that verifies k drafted tokens for each of n
sequences is taken to be one of n (k + 1) sequences that have the context of n: rows compute for themselves and read KV together, as
kernels of GPUs do. With fewer sequences than stages that is a little too quick, since rows of one sequence go round together.

Pure. Knows seconds, tokens and bytes; no model, no machine.
"""

from dataclasses import dataclass

from spotserve.planner.speed import ReplicaSpeed
from spotserve.speculation.advisor import DraftCost, DraftProfile, Load, Verdict, best_choice, worth_loading


@dataclass(frozen=True, slots=True)
class Draft:
    """A drafter as it was measured with this target, in figures that hold on other machines as well."""

    acceptance: tuple[float, ...]
    """By depth, as in `DraftProfile`; so are the next two."""
    cost_share: float
    """Seconds to draft one token of each sequence over those of a step of the target (c)."""
    tokens_by_length: tuple[float, ...] = ()
    drafted_by_length: tuple[float, ...] = ()
    weight_bytes: int = 0
    kv_bytes_per_token: int = 0

    def __post_init__(self) -> None:
        assert self.cost_share >= 0 and min(self.weight_bytes, self.kv_bytes_per_token) >= 0

    def profile(self, step_s: float) -> DraftProfile:
        """Beside a target whose step without drafts takes `step_s`."""
        cost = DraftCost(0.0, self.cost_share * step_s, 0.0)
        return DraftProfile("", cost, self.acceptance, self.tokens_by_length, self.drafted_by_length)


@dataclass(frozen=True, slots=True)
class _Steps:
    """Steps of a replica; an `advisor.StepTimes`."""

    speed: ReplicaSpeed

    @property
    def kv_reread(self) -> float:
        return 0.0

    def at(self, *, sequences: float, rows: float, kv_tokens: float) -> float:
        return self.speed.token_s(max(sequences, rows), kv_tokens)


@dataclass(frozen=True, slots=True)
class DraftingSpeed:
    """A replica that drafts as many tokens as pay at the moment, or none; a `ReplicaSpeed`."""

    speed: ReplicaSpeed
    """Without."""
    draft: Draft
    kv_tokens: int
    """What the drafter leaves."""

    @property
    def max_batch(self) -> int:
        """See `ReplicaSpeed.max_batch`."""
        return self.speed.max_batch

    def token_s(self, sequences: float, context_tokens: float) -> float:
        """See `ReplicaSpeed.token_s`: mean time per token, of those that come several at a time."""
        sequences = max(1.0, sequences)
        load = Load(sequences, context_tokens / sequences)
        profile = self.draft.profile(self.speed.token_s(sequences, context_tokens))
        return sequences / best_choice(_Steps(self.speed), profile, load=load).tokens_per_s

    def prompt_s(self, tokens: float) -> float:
        """See `ReplicaSpeed.prompt_s`: the drafter reads the prompt as well."""
        return self.speed.prompt_s(tokens) * (1 + self.draft.cost_share)

    def first_token_s(self, tokens: float) -> float:
        """See `ReplicaSpeed.first_token_s`."""
        return self.speed.first_token_s(tokens) + self.speed.prompt_s(tokens) * self.draft.cost_share


@dataclass(frozen=True, slots=True)
class Drafting:
    """Whether a replica gets a drafter, and how fast it is then."""

    verdict: Verdict
    speed: ReplicaSpeed


def drafting(speed: ReplicaSpeed, draft: Draft, *, load: Load, kv_bytes_per_token: int, free_bytes: int = 0) -> Drafting:
    """Decides for one replica.

    Args:
        speed: without a drafter.
        draft: the drafter.
        load: that is expected.
        kv_bytes_per_token: of the target's KV, on the device that would hold the drafter.
        free_bytes: of that device, beside weights and KV cache. What the cache has beyond the load may be taken, too.
    """
    spare_tokens = max(0, int(speed.kv_tokens - load.sequences * load.context_tokens))
    verdict = worth_loading(
        _Steps(speed),
        draft.profile(speed.token_s(load.sequences, load.sequences * load.context_tokens)),
        load=load,
        weight_bytes=draft.weight_bytes,
        kv_bytes_per_token=draft.kv_bytes_per_token,
        free_bytes=free_bytes + spare_tokens * kv_bytes_per_token,
    )
    if not verdict.is_loaded:
        return Drafting(verdict, speed)
    room = free_bytes + speed.kv_tokens * kv_bytes_per_token - draft.weight_bytes
    kv_tokens = min(speed.kv_tokens, room // (kv_bytes_per_token + draft.kv_bytes_per_token))
    return Drafting(verdict, DraftingSpeed(speed, draft, kv_tokens))
