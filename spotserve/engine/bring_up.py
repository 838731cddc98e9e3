"""From a model's files to a rank that can compute: its weights, its stage and its cache.

A rank that is alone needs no more (`lone_engine`); how several are joined is for whoever knows where they are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from spotserve.config import EngineSettings
from spotserve.core.errors import ModelError
from spotserve.core.model import ModelSpec
from spotserve.engine.assemble import Pull, assemble
from spotserve.engine.attention import KvCache
from spotserve.engine.cuts import StageSlice
from spotserve.engine.device import device_of
from spotserve.engine.draft_model import PagedDraftModel
from spotserve.engine.engine import Engine, num_kv_blocks
from spotserve.engine.ranks.exchange import Readers
from spotserve.engine.ranks.group import Group
from spotserve.engine.ranks.leader import Ranks, SingleRank
from spotserve.engine.ranks.memory import HeldWeights, RankMemory, heads_held
from spotserve.engine.ranks.rank import Rank
from spotserve.engine.shards import Alone, Shards
from spotserve.engine.speculators import make_speculator
from spotserve.engine.stages import choose_stage
from spotserve.engine.weights import OpenModel, open_model, read_weights
from spotserve.speculation.speculator import Speculator


@dataclass(frozen=True, slots=True)
class Prepared:
    """A rank that is not joined yet."""

    make_rank: Callable[[Group | None], Rank]
    """The rank, once its group is joined; None: it is alone."""
    weights: HeldWeights
    pulled_bytes: int
    """Weights that came from other devices."""


def prepare(
    model: OpenModel,
    stage_slice: StageSlice,
    settings: EngineSettings,
    *,
    memory: RankMemory,
    shards: Shards,
    pulls: Sequence[Pull] = (),
    secret: str = "",
) -> Prepared:
    """Everything that takes long: weights from this device's memory, from peers (`pulls`) and from files; stage; cache.

    On a GPU the stage has the weights in its memory. What was put together stays in the machine's: peers read it there, and the
    next cut starts from it.

    Raises:
        ModelError: the model cannot be cut like this, read or computed, or this process has no such device.
        PeerLost: a peer is gone.
    """
    spec, device = model.catalogue.spec, device_of(settings)
    readers = Readers(secret=secret)
    try:
        with torch.inference_mode():
            tensors, pulled_bytes = assemble(
                model.catalogue,
                stage_slice,
                dtype=settings.dtype,
                memory=memory,
                pulls=pulls,
                readers=readers,
                read_files=lambda wanted: read_weights(model, wanted),
            )
            heads = heads_held(spec.num_kv_heads, stage_slice)
            cache = KvCache(
                stage_slice.layers,
                num_kv_heads=len(heads),
                head_size=spec.head_size,
                num_blocks=num_kv_blocks(settings) + 1,
                block_tokens=settings.block_tokens,
                dtype=model.catalogue.dtype,
                device=device,
            )
            stage = choose_stage(model.catalogue, stage_slice, tensors, shards, settings)
    finally:
        readers.close()

    def make_rank(group: Group | None) -> Rank:
        return Rank(
            stage,
            stage_slice,
            cache,
            heads=heads,
            hidden_size=int(model.catalogue.config.get_text_config().hidden_size),
            vocabulary_size=spec.vocabulary_size,
            memory=memory,
            group=group,
        )

    cuts = {name: model.catalogue.entries[name].cut for name in tensors}
    return Prepared(make_rank, HeldWeights(stage_slice, tensors, cuts), pulled_bytes)


@dataclass(frozen=True, slots=True)
class LoneModel:
    """A whole model on one rank in this process. Its engines share weights and cache: one at a time may have work."""

    ranks: Ranks
    spec: ModelSpec
    end_token_ids: tuple[int, ...]
    settings: EngineSettings

    def engine(self, speculator: Speculator | None) -> Engine:
        """An engine that drafts as `speculator` says; None: never. With a prefix cache there can be only one."""
        return Engine(self.ranks, self.settings, spec=self.spec, end_token_ids=self.end_token_ids, speculator=speculator)


def load_alone(settings: EngineSettings) -> LoneModel:
    """Loads a model.

    Raises:
        ModelError: it cannot be read or computed.
    """
    torch.set_num_threads(settings.threads)
    model = open_model(settings)
    spec = model.catalogue.spec
    prepared = prepare(model, _whole(spec), settings, memory=RankMemory(), shards=Alone())
    return LoneModel(SingleRank(prepared.make_rank(None)), spec, tuple(model.end_token_ids), settings)


def lone_engine(settings: EngineSettings, *, speculator: Speculator | None = None) -> Engine:
    """A whole model on one rank in this process.

    Args:
        settings: the engine's section.
        speculator: in place of the one that `settings.speculation` names.

    Raises:
        ModelError: the model or its draft model cannot be read or computed.
    """
    model = load_alone(settings)
    if speculator is None:
        speculator = make_speculator(settings, load_draft_model(settings, model.spec))
    return model.engine(speculator)


def load_draft_model(settings: EngineSettings, target: ModelSpec) -> PagedDraftModel | None:
    """The draft model that the settings ask for, whole, in this process; None: they ask for none. Takes as long as its weights are
    large.

    Raises:
        ModelError: it cannot be read or computed, or has another vocabulary than the target.
    """
    if settings.draft_model is None or not settings.drafts_with_model:
        return None
    own = settings.model_copy(update={"model": settings.draft_model, "quantization": "none", "invariant": "batch"})
    model = open_model(own)
    spec = model.catalogue.spec
    if spec.vocabulary_size != target.vocabulary_size:
        raise ModelError(
            f"draft model {settings.draft_model} has {spec.vocabulary_size} tokens in its vocabulary, {target.name} has "
            f"{target.vocabulary_size}: a draft model has to share its target's tokenizer"
        )
    prepared = prepare(model, _whole(spec), own, memory=RankMemory(), shards=Alone())
    return PagedDraftModel(
        prepared.make_rank(None),
        num_blocks=num_kv_blocks(own),
        vocabulary_size=spec.vocabulary_size,
        context_tokens=spec.context_tokens,
    )


def _whole(spec: ModelSpec) -> StageSlice:
    return StageSlice(range(spec.num_layers), spec.num_layers)
