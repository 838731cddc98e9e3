"""The replicas that this worker leads: each an engine in a thread of its own, with the ranks that compute for it.

While a replica is re-cut the worker may lead two: the one that still serves, and the one that will. Knows sequences by their
ids only.
"""

import contextlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from spotserve.core.cut import layers_of, units_held
from spotserve.core.errors import PeerLost
from spotserve.core.messages import Activate, Address, KvHolder
from spotserve.core.model import ModelSpec
from spotserve.core.plan import Parallel
from spotserve.engine.ranks.exchange import Readers, fetch_kv
from spotserve.engine.ranks.memory import RankMemory
from spotserve.engine.ranks.messages import Answer, Fetched, FetchKv, ForgetKv, KvSource, Units
from spotserve.engine.results import FrozenSequence
from spotserve.worker.engine_thread import EngineThread


@dataclass(frozen=True, slots=True)
class KvHome:
    """Where the KV of a sequence is: the shape of its replica, and its ranks."""

    parallel: Parallel
    holders: tuple[KvHolder, ...]
    dtype: str


class Fetcher:
    """Gets KV to the ranks of one replica, one sequence at a time: a device's port has one flow at a time."""

    def __init__(
        self, activate: Activate, spec: ModelSpec, *, dtype: str, own: Address | None, memory: RankMemory | None, secret: str
    ) -> None:
        """`own` and `memory`: of the rank that is in this process, if there is one."""
        self._spec = spec
        self._dtype = dtype
        self._parallel = activate.replica.parallel
        self._members = activate.members
        self._own = own
        self._memory = memory
        self._readers = {member.rank: Readers(secret=secret) for member in activate.members}
        self._pool = ThreadPoolExecutor(len(activate.members), thread_name_prefix="fetch")
        self._turns = ThreadPoolExecutor(1, thread_name_prefix="fetch turn")
        self._is_closed = False

    def fetch(self, frozen: FrozenSequence, home: KvHome) -> "Future[int]":
        """Has every rank fetch its part and keep it until it is placed, or `forget`; bytes that went from one device to another.

        Raises:
            PeerLost: somebody is gone, or what is there does not fit this replica: compute it again instead.
        """
        return self._turns.submit(self._fetch_all, frozen, home)

    def forget(self, request_id: str) -> "Future[None]":
        """Has every rank forget what it fetched, after whatever was asked before: it will not be placed. Also after `close`."""
        return self._turns.submit(self._forget_all, request_id)

    def close(self) -> None:
        """Hangs up, after whatever was asked before."""
        self._is_closed = True
        self._turns.submit(self._hang_up)

    def _hang_up(self) -> None:
        self._pool.shutdown(wait=False)
        for readers in self._readers.values():
            readers.close()

    def _fetch_all(self, frozen: FrozenSequence, home: KvHome) -> int:
        if home.dtype != self._dtype:
            raise PeerLost(f"its KV is {home.dtype}, not {self._dtype}")
        if frozen.computed_tokens == 0:
            return 0
        requests = [(member.rank, self._request(frozen, home, member.slot.stage, member.slot.shard)) for member in self._members]
        return sum(self._pool.map(lambda asked: self._fetch(*asked), requests))

    def _forget_all(self, request_id: str) -> None:
        for member in self._members:
            if member.rank == self._own:
                assert self._memory is not None
                self._memory.take_fetched(request_id)
                continue
            with contextlib.suppress(PeerLost):  # what a rank has fetched goes with it
                self._readers[member.rank].ask(member.rank, ForgetKv(request_id), _nothing)
        if self._is_closed:
            self._hang_up()

    def _request(self, frozen: FrozenSequence, home: KvHome, stage: int, shard: int) -> FetchKv:
        layers, heads = _part(self._spec, self._parallel, stage, shard)
        sources = []
        for holder in home.holders:
            has_layers, has_heads = _part(self._spec, home.parallel, holder.stage, holder.shard)
            sources.append(KvSource(holder.rank, has_layers, has_heads))
        return FetchKv(
            key=frozen.request.request_id,
            dtype=self._dtype,
            num_tokens=frozen.computed_tokens,
            head_size=self._spec.head_size,
            layers=layers,
            heads=heads,
            sources=tuple(sources),
        )

    def _fetch(self, rank: Address, request: FetchKv) -> int:
        if rank == self._own:
            assert self._memory is not None
            return fetch_kv(request, self._memory, rank, self._readers[rank])
        answer = self._readers[rank].ask(rank, request, _nothing)
        if not isinstance(answer, Fetched):
            raise PeerLost(f"{rank.host}:{rank.port} answered {type(answer).__name__}")
        return answer.num_bytes


def _nothing(_: Answer) -> list[torch.Tensor]:
    return []


def _part(spec: ModelSpec, parallel: Parallel, stage: int, shard: int) -> tuple[Units, Units]:
    layers, heads = layers_of(spec, parallel)[stage], units_held(spec.num_kv_heads, parallel.tensor, shard)
    return Units(layers.start, layers.stop), Units(heads.start, heads.stop)


@dataclass(slots=True)
class LedReplica:
    """One replica that this worker leads."""

    activate: Activate
    thread: EngineThread
    fetcher: Fetcher | None
    """None: its engine does not let KV in or out."""
    home: KvHome
    is_draining: bool = False
    suggested_replica_id: str | None = None
    """Where the controller wants its new requests to go while it drains."""

    @property
    def replica_id(self) -> str:
        """Its name."""
        return self.activate.replica.replica_id
