"""The policies that `spotserve.bench.speculation` compares, as users name them. Knows no torch: the command line reads them."""

from typing import Final

from pydantic import ValidationError

from spotserve.config import EngineSettings

PLAIN: Final = "off"
ORACLE: Final = "oracle"
DEEPEST: Final = 8
"""Tokens that drafts of `adaptive` and the oracle have at most."""
EXIST: Final = f"{PLAIN}, adaptive, smartspec-2024, {ORACLE}, and ngram:K, suffix:K, model:K, staged:K with K tokens at most"
_WITHOUT_MODEL: Final = "off,ngram:2,ngram:4,ngram:8,suffix:2,suffix:4,suffix:8,adaptive,oracle"
_WITH_MODEL: Final = "off,ngram:4,suffix:4,model:1,model:2,model:4,staged:4,adaptive,oracle"


def read_policies(text: str | None, *, draft_model: str | None) -> tuple[str, ...]:
    """Different policies in the order in which they are named, `off` before all others: they are compared with it.

    Args:
        text: names with commas between; None: some of each.
        draft_model: what `model` and `staged` draft with.

    Raises:
        ValueError: a name is unknown, or needs a draft model.
    """
    if text is None:
        text = _WITHOUT_MODEL if draft_model is None else _WITH_MODEL
    names = tuple(dict.fromkeys((PLAIN, *(name for part in text.split(",") if (name := part.strip())))))
    for name in names:
        if name == ORACLE:
            continue
        if draft_model is None and name.partition(":")[0] in ("model", "staged"):
            raise ValueError(f"{name} needs a draft model (--draft-model MODEL)")
        try:
            EngineSettings(speculation=name, draft_model=draft_model)
        except ValidationError as error:
            raise ValueError(f"no policy is called {name}: there are {EXIST}") from error
    return names


def deepest(names: tuple[str, ...]) -> int:
    """Tokens that a draft of any of them has at most."""
    return max(DEEPEST, *(int(depth) for name in names if (depth := name.partition(":")[2])), 0)
