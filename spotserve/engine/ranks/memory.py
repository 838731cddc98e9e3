"""What one device has in memory that others may ask for: weights by slice, and the KV of sequences that are being handed over.

Shared by all slots of a device and by every thread that answers reads; the only state of a rank that has a lock.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from spotserve.core.cut import units_held
from spotserve.core.errors import PeerLost
from spotserve.engine.attention import KvCache
from spotserve.engine.cuts import StageSlice, TensorCut

HOLD_TIMEOUT_S = 2.0
"""How long a read waits for a sequence that its leader is about to hold."""


@dataclass(frozen=True, slots=True)
class HeldWeights:
    """Parameters of one slice: for each the cut, and the part that is here."""

    stage_slice: StageSlice
    tensors: Mapping[str, torch.Tensor]
    """In the processor's memory, wherever the slice is computed."""
    cuts: Mapping[str, TensorCut]


@dataclass(frozen=True, slots=True)
class HeldKv:
    """A sequence that has stopped, in the cache of its old owner."""

    cache: KvCache
    slots: Sequence[int]
    heads: range
    """Of the model, on this shard."""


class RankMemory:
    """One device's."""

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self._weights: list[HeldWeights] = []
        self._kv: dict[str, HeldKv] = {}
        self._fetched: dict[str, tuple[torch.Tensor, ...]] = {}

    # ------------------------------------------------------------------ weights

    def add_weights(self, held: HeldWeights) -> None:
        """From now on others may have these."""
        with self._lock:
            self._weights.append(held)

    def drop_weights(self, held: HeldWeights) -> None:
        """No longer. Harmless when they are not here."""
        with self._lock:
            self._weights = [kept for kept in self._weights if kept is not held]

    def parts(self, name: str) -> list[tuple[TensorCut, tuple[range, ...], torch.Tensor]]:
        """What is here of a parameter: its cut, the units of each segment, and the tensor that has them, per slice that is held."""
        with self._lock:
            kept = list(self._weights)
        found = []
        for held in kept:
            tensor = held.tensors.get(name)
            if tensor is not None:
                cut = held.cuts[name]
                found.append((cut, cut.held(held.stage_slice.tensor, held.stage_slice.shard), tensor))
        return found

    # ------------------------------------------------------------------ KV

    def hold_kv(self, key: str, held: HeldKv) -> None:
        """Others may read it until `drop_kv`."""
        with self._lock:
            self._kv[key] = held
            self._lock.notify_all()

    def drop_kv(self, key: str, cache: KvCache) -> None:
        """Nobody may read what `cache` holds of it any more, nor is reading it when this returns: its slots may be used again.
        Harmless when it is not here, or is held by a newer owner on this device."""
        with self._lock:
            held = self._kv.get(key)
            if held is not None and held.cache is cache:
                del self._kv[key]

    def drop_kv_of(self, cache: KvCache) -> None:
        """A slot has ended: nothing of its cache is to be had any more."""
        with self._lock:
            self._kv = {key: held for key, held in self._kv.items() if held.cache is not cache}

    def read_kv(self, key: str, layer: int, heads: range) -> torch.Tensor:
        """A copy [tokens, 2, heads, head_size] in the processor's memory.

        Raises:
            PeerLost: nobody holds it here, not even after a while.
        """
        with self._lock:
            if not self._lock.wait_for(lambda: key in self._kv, HOLD_TIMEOUT_S):
                raise PeerLost(f"the KV of {key} is not held here")
            held = self._kv[key]
            if layer not in held.cache.layers or heads.start < held.heads.start or heads.stop > held.heads.stop:
                raise PeerLost(f"layer {layer}, heads {heads.start} to {heads.stop} of {key} are not on this rank")
            first = held.heads.start
            return held.cache.read(layer, held.slots, range(heads.start - first, heads.stop - first))

    def keep_fetched(self, key: str, layers: tuple[torch.Tensor, ...]) -> None:
        """KV that has come for a sequence that will be placed here: per layer [tokens, 2, heads, head_size]."""
        with self._lock:
            self._fetched[key] = layers

    def take_fetched(self, key: str) -> tuple[torch.Tensor, ...]:
        """What `keep_fetched` kept; empty when there is nothing."""
        with self._lock:
            return self._fetched.pop(key, ())


def heads_held(num_kv_heads: int, stage_slice: StageSlice) -> range:
    """Key-value heads of the model on one shard."""
    return units_held(num_kv_heads, stage_slice.tensor, stage_slice.shard)
