"""From a model's files to a rank that can compute: its weights, its stage and its cache.

A rank that is alone needs no more (`lone_engine`); how several are joined is for whoever knows where they are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from spotserve.config import EngineSettings
from spotserve.engine.assemble import Pull, assemble
from spotserve.engine.attention import KvCache
from spotserve.engine.cuts import StageSlice
from spotserve.engine.engine import Engine, num_kv_blocks
from spotserve.engine.ranks.exchange import Readers
from spotserve.engine.ranks.group import Group
from spotserve.engine.ranks.leader import SingleRank
from spotserve.engine.ranks.memory import HeldWeights, RankMemory, heads_held
from spotserve.engine.ranks.rank import Rank
from spotserve.engine.shards import Alone, Shards
from spotserve.engine.stages import choose_stage
from spotserve.engine.weights import OpenModel, open_model, read_weights
from spotserve.speculation.drafter import Drafter


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

    Raises:
        ModelError: the model cannot be cut like this, read or computed.
        PeerLost: a peer is gone.
    """
    spec = model.catalogue.spec
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
                device=torch.device("cpu"),
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


def lone_engine(settings: EngineSettings, *, drafter: Drafter | None = None) -> Engine:
    """A whole model on one rank in this process.

    Args:
        settings: the engine's section.
        drafter: see `Engine`.

    Raises:
        ModelError: the model cannot be read or computed.
    """
    torch.set_num_threads(settings.threads)
    model = open_model(settings)
    whole = StageSlice(range(model.catalogue.spec.num_layers), model.catalogue.spec.num_layers)
    prepared = prepare(model, whole, settings, memory=RankMemory(), shards=Alone())
    ranks = SingleRank(prepared.make_rank(None))
    return Engine(ranks, settings, spec=model.catalogue.spec, end_token_ids=model.end_token_ids, drafter=drafter)
