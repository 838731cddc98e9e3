"""What `spotserve advise` measured, as one document: written by whoever has models, read by whoever decides.

Knows the figures of `advisor`; does not know how they were measured.
"""

import msgspec

from spotserve.speculation.advisor import DraftProfile
from spotserve.speculation.cost import StepCost


class DraftFindings(msgspec.Struct, frozen=True, kw_only=True):
    """One drafter with this target on this machine."""

    profile: DraftProfile
    is_model: bool
    """Else it computes on the host, without weights."""
    weight_bytes: int
    kv_bytes_per_token: int


class Findings(msgspec.Struct, frozen=True, kw_only=True):
    """A target, and drafters for it."""

    target: str
    dtype: str
    threads: int
    step: StepCost
    step_error: float
    """Mean of |predicted - measured| / measured over the steps that `step` was fitted to."""
    answer_tokens: int
    """Tokens of the target's own answers by which the drafters were judged."""
    context_tokens: float
    """Of the sequences then, on average."""
    drafts: tuple[DraftFindings, ...]
