"""What speculation did for a call: the drafts that were verified for it, and what of it the usage tells.

Drafts come with the deltas of a transcript, so counts add up over the owners that a sequence has had, and a step that was computed
twice counts once. Progress that came in one piece, from the store or from a worker that was attached to anew, brings none.
"""

from collections import Counter
from typing import Any, NamedTuple


class VerifiedDraft(NamedTuple):
    """What became of one draft, of one sequence in one step."""

    drafter: str
    """Who made it; empty: not known."""
    tokens: int
    accepted: int


def completion_tokens_details(drafts: Counter[VerifiedDraft]) -> dict[str, Any]:
    """The field of that name: predicted tokens in OpenAI's words, and statistics in those of vLLM."""
    drafted, accepted = _draft_tokens(drafts), _accepted_tokens(drafts)
    steps = drafts.total()
    return {
        "accepted_prediction_tokens": accepted,
        "rejected_prediction_tokens": drafted - accepted,
        "speculation": {
            **_sums(drafts),
            "mean_acceptance_length": 1 + accepted / steps if steps else None,
            "draft_acceptance_rate": accepted / drafted if drafted else None,
            "accepted_per_position": _accepted_per_position(drafts),
            "drafters": {name: _sums(of_drafter) for name, of_drafter in sorted(_by_drafter(drafts).items())},
        },
    }


def _sums(drafts: Counter[VerifiedDraft]) -> dict[str, int]:
    return {
        "num_spec_steps": drafts.total(),
        "num_draft_tokens": _draft_tokens(drafts),
        "num_accepted_tokens": _accepted_tokens(drafts),
    }


def _draft_tokens(drafts: Counter[VerifiedDraft]) -> int:
    return sum(draft.tokens * count for draft, count in drafts.items())


def _accepted_tokens(drafts: Counter[VerifiedDraft]) -> int:
    return sum(draft.accepted * count for draft, count in drafts.items())


def _accepted_per_position(drafts: Counter[VerifiedDraft]) -> list[int]:
    """Of each position, as far as any draft was accepted: how many were accepted there."""
    deepest = max((draft.accepted for draft in drafts), default=0)
    return [sum(count for draft, count in drafts.items() if draft.accepted > position) for position in range(deepest)]


def _by_drafter(drafts: Counter[VerifiedDraft]) -> dict[str, Counter[VerifiedDraft]]:
    split: dict[str, Counter[VerifiedDraft]] = {}
    for draft, count in drafts.items():
        split.setdefault(draft.drafter or "other", Counter())[draft] += count
    return split
