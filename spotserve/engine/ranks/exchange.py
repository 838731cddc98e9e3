"""Weights and KV from one device's memory to another's: asking, answering, and putting the parts together.

Reads go over links of their own, beside the steps. What is on the asking device already is never asked for over a link.
"""

from collections.abc import Callable, Sequence

import torch

from spotserve.core.errors import PeerLost, WireError
from spotserve.core.messages import Address
from spotserve.engine.dtypes import DTYPES
from spotserve.engine.ranks.group import raw_bytes
from spotserve.engine.ranks.memory import RankMemory
from spotserve.engine.ranks.messages import (
    Answer,
    FetchKv,
    Given,
    Offered,
    Read,
    Reader,
    ReadKv,
    ReadWeights,
    Refused,
    Units,
)
from spotserve.link import Link, dial

READ_TIMEOUT_S = 5.0
"""How long one read may stand still."""


class Readers:
    """Links for reads to other ranks, opened when first needed; used by one thread."""

    def __init__(self, *, secret: str) -> None:
        self._secret = secret
        self._links: dict[Address, Link[Answer]] = {}

    def ask(self, rank: Address, request: Read, accept: Callable[[Answer], Sequence[torch.Tensor]]) -> Answer:
        """Asks `rank`; `accept` gives the tensors, contiguous and on the processor, that the payload of its answer fills.

        Raises:
            PeerLost: it is gone, stands still, refuses, or gives something else than was asked.
        """
        try:
            link = self._links.get(rank)
            if link is None:
                link = self._links[rank] = dial(rank, secret=self._secret, inbound=Answer, timeout_s=READ_TIMEOUT_S)
                link.send(Reader())
            link.send(request)
            answer, payload_bytes = link.receive()
            if isinstance(answer, Refused):
                raise PeerLost(f"{rank.host}:{rank.port} refuses: {answer.reason}")
            into = accept(answer)
            if payload_bytes != sum(tensor.nbytes for tensor in into):
                raise PeerLost(f"{rank.host}:{rank.port} gave {payload_bytes} bytes, which is not what was asked for")
            for tensor in into:
                link.read_into(raw_bytes(tensor))
        except (PeerLost, WireError) as error:
            broken = self._links.pop(rank, None)
            if broken is not None:
                broken.close()
            raise PeerLost(str(error)) from error
        return answer

    def close(self) -> None:
        """Hangs up on all."""
        for link in self._links.values():
            link.close()
        self._links.clear()


def fetch_kv(request: FetchKv, memory: RankMemory, own: Address, readers: Readers) -> int:
    """Puts together what `request` names and keeps it in `memory`; the bytes of it that came from other devices.

    Raises:
        PeerLost: a source is gone or does not have it.
    """
    dtype, wanted = DTYPES[request.dtype], request.heads.numbers
    layers = {
        layer: torch.empty((request.num_tokens, 2, len(wanted), request.head_size), dtype=dtype) for layer in request.layers.numbers
    }
    missing = {layer: set(wanted) for layer in layers}
    moved_bytes = 0
    for source in sorted(request.sources, key=lambda source: source.rank != own):  # this device first
        common = [layer for layer in layers if layer in source.layers.numbers]
        heads = sorted({head for layer in common for head in missing[layer] if head in source.heads.numbers})
        if not common or not heads:
            continue
        span = range(heads[0], heads[-1] + 1)
        if source.rank == own:
            parts = [memory.read_kv(request.key, layer, span) for layer in common]
        else:
            parts = [torch.empty((request.num_tokens, 2, len(span), request.head_size), dtype=dtype) for _ in common]
            ask = ReadKv(request.key, Units(common[0], common[-1] + 1), Units(span.start, span.stop))
            readers.ask(source.rank, ask, lambda _, parts=parts: parts)  # type: ignore[misc]
            moved_bytes += sum(part.nbytes for part in parts)
        for layer, part in zip(common, parts, strict=True):
            if part.shape[0] != request.num_tokens:
                raise PeerLost(f"the KV of {request.key} is of {part.shape[0]} tokens, not of {request.num_tokens}")
            layers[layer][:, :, span.start - wanted.start : span.stop - wanted.start] = part
            missing[layer] -= set(span)
    if any(missing.values()):
        raise PeerLost(f"nobody has all of the KV of {request.key}")
    memory.keep_fetched(request.key, tuple(layers.values()))
    return moved_bytes


def give_weights(request: ReadWeights, memory: RankMemory) -> tuple[Offered, list[memoryview]]:
    """The answer to a peer's read, and its payload."""
    offered, payload = [], []
    for name, wanted in zip(request.names, request.units, strict=True):
        units: tuple[Units, ...] = ()
        for cut, held, tensor in memory.parts(name):
            if tensor.dtype != DTYPES[request.dtype]:
                continue
            if not cut.segments:
                units, views = (Units(0, 1),), [tensor]
            else:
                common = [_common(has, wants.numbers) for has, wants in zip(held, wanted, strict=True)]
                units, views = tuple(Units(part.start, part.stop) for part in common), cut.take(tensor, held, common)
            if views:
                payload += [raw_bytes(view.contiguous()) for view in views]
                break
            units = ()
        offered.append(units)
    return Offered(tuple(offered)), payload


def _common(first: range, second: range) -> range:
    start, stop = max(first.start, second.start), min(first.stop, second.stop)
    return range(start, stop) if start < stop else range(0)


def give_kv(request: ReadKv, memory: RankMemory) -> tuple[Given | Refused, list[memoryview]]:
    """The answer to a peer's read, and its payload."""
    try:
        parts = [memory.read_kv(request.key, layer, request.heads.numbers) for layer in request.layers.numbers]
    except PeerLost as error:
        return Refused(str(error)), []
    payload = [raw_bytes(part.contiguous()) for part in parts]
    return Given(sum(part.nbytes for part in payload)), payload
