"""Which speculator the settings ask for. The one place that knows all drafters by name."""

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from spotserve.config import EngineSettings
from spotserve.engine.batch import ROW_MULTIPLE
from spotserve.speculation.adaptive import AdaptiveSpeculator
from spotserve.speculation.cost import UNKNOWN, StepCost
from spotserve.speculation.drafter import Drafter
from spotserve.speculation.drafters.model import DraftModel, DraftModelDrafter
from spotserve.speculation.drafters.ngram import NgramDrafter
from spotserve.speculation.drafters.suffix import SuffixDrafter
from spotserve.speculation.fixed import FixedSpeculator
from spotserve.speculation.smartspec_2024 import SmartSpec2024
from spotserve.speculation.speculator import Speculator

_KV_REREAD_ON_PROCESSOR: Final = 0.3
"""Measured: a row finds the keys and values that the row before it read in the processor's caches, mostly."""


def step_law(device: str) -> StepCost:
    """How steps are padded and context is read again on a device; without seconds. On a GPU the rows of a sequence are one problem,
    which reads them once, and steps are rounded so that few shapes have to be recorded."""
    if device == "cpu":
        return replace(UNKNOWN, row_multiple=ROW_MULTIPLE, kv_reread=_KV_REREAD_ON_PROCESSOR)
    return replace(UNKNOWN, row_multiple=ROW_MULTIPLE, doubling_steps=2, kv_reread=0.0)


def make_speculator(settings: EngineSettings, draft_model: DraftModel | None) -> Speculator | None:
    """None: nothing is ever drafted.

    Args:
        settings: the engine's section.
        draft_model: the one that `settings.draft_model` names, loaded; None: none is, or not here. What needs it is left out.
    """
    law = step_law(settings.device)
    model = None if draft_model is None else DraftModelDrafter(draft_model, first_stage=NgramDrafter())
    match settings.speculation.partition(":"):
        case "off", _, _:
            return None
        case "adaptive", _, _:
            return AdaptiveSpeculator((NgramDrafter(), SuffixDrafter()), model, law=law)
        case "smartspec-2024", _, _:
            if draft_model is None:
                return SmartSpec2024(NgramDrafter(), law=law)
            plain = DraftModelDrafter(draft_model, second_choices=False)
            return SmartSpec2024(plain, law=law, uses_model=True)
        case name, _, depth:
            drafter = _drafter(name, draft_model)
            return None if drafter is None else FixedSpeculator(drafter, max_depth=int(depth))


def _drafter(name: str, draft_model: DraftModel | None) -> Drafter | None:
    without_model: dict[str, Callable[[], Drafter]] = {"ngram": NgramDrafter, "suffix": SuffixDrafter}
    if name in without_model:
        return without_model[name]()
    if draft_model is None:
        return None
    first_stage = NgramDrafter() if name == "staged" else None
    return DraftModelDrafter(draft_model, first_stage=first_stage, second_choices=False)
