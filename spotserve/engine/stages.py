"""Which way a rank computes its stage: the fastest that is right."""

from collections.abc import Mapping

import torch

from spotserve.config import EngineSettings
from spotserve.core.errors import ModelError
from spotserve.engine.catalogue import Catalogue
from spotserve.engine.cuts import StageSlice
from spotserve.engine.device import device_of
from spotserve.engine.fused import FusedStage
from spotserve.engine.library_stage import LibraryStage, build_module
from spotserve.engine.selfcheck import MakeStage, check
from spotserve.engine.shards import Shards
from spotserve.engine.stage import Stage

_REFERENCE: Mapping[torch.dtype, torch.dtype] = {torch.float64: torch.float64}
"""What the library's own stage is checked in, if not in float32: in a coarser dtype its experts choose differently by chance."""


def choose_stage(
    catalogue: Catalogue,
    stage_slice: StageSlice,
    weights: Mapping[str, torch.Tensor],
    shards: Shards,
    settings: EngineSettings,
) -> Stage:
    """Makes the stage of one rank.

    Args:
        catalogue: of the model.
        stage_slice: what the rank computes.
        weights: what `catalogue.needed(stage_slice)` names, cut as it says.
        shards: those of the stage.
        settings: device, arithmetic and quantisation.

    Raises:
        ModelError: the model cannot be computed like this; the message names it and the reason.
    """
    name, tensor, device = catalogue.spec.name, stage_slice.tensor, device_of(settings)
    module = build_module(catalogue, stage_slice, weights)
    if FusedStage.fits(module, stage_slice) and _fused_is_right(catalogue, tensor, settings):
        return FusedStage(
            module, stage_slice, shards, invariant=settings.invariant, quantization=settings.quantization, device=device
        )
    reason = check(
        catalogue,
        tensor,
        library_maker(settings),
        dtype=_REFERENCE.get(catalogue.dtype, torch.float32),
        kind=f"library {settings.invariant}",
        device=device,
    )
    if reason is not None:
        raise ModelError(f"{name}: {reason}")
    return LibraryStage(
        catalogue, module, stage_slice, shards, invariant=settings.invariant, quantization=settings.quantization, device=device
    )


def _fused_is_right(catalogue: Catalogue, tensor: int, settings: EngineSettings) -> bool:
    make, kind = fused_maker(settings), f"fused {settings.invariant}"
    return check(catalogue, tensor, make, dtype=catalogue.dtype, kind=kind, device=device_of(settings)) is None


def fused_maker(settings: EngineSettings) -> MakeStage:
    """Makes stages of the short path; weights are not rounded, as that is no error of arithmetic."""

    def make(catalogue: Catalogue, stage_slice: StageSlice, weights: Mapping[str, torch.Tensor], shards: Shards) -> Stage:
        module = build_module(catalogue, stage_slice, weights)
        return FusedStage(module, stage_slice, shards, invariant=settings.invariant, device=device_of(settings))

    return make


def library_maker(settings: EngineSettings) -> MakeStage:
    """Makes stages of the library's modules; weights are not rounded, as that is no error of arithmetic."""

    def make(catalogue: Catalogue, stage_slice: StageSlice, weights: Mapping[str, torch.Tensor], shards: Shards) -> Stage:
        module = build_module(catalogue, stage_slice, weights)
        return LibraryStage(catalogue, module, stage_slice, shards, invariant=settings.invariant, device=device_of(settings))

    return make
