"""The weights of a slot from memory, peers and files, against brute force over single units: every value is right, nothing that
is here travels, and nothing that a peer gives is read."""

import socket
import struct
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rank_scene import PATIENCE_S, SECRET, Seat, seats
from stage_scene import LAYERS, tiny_config

from spotserve.core.cut import stage_cuts
from spotserve.core.errors import PeerLost
from spotserve.core.messages import Address
from spotserve.engine.assemble import Pull, assemble
from spotserve.engine.catalogue import Catalogue, Entry, Held, is_at_home, make_catalogue
from spotserve.engine.cuts import StageSlice
from spotserve.engine.ranks.exchange import Readers
from spotserve.engine.ranks.memory import HeldWeights, RankMemory
from spotserve.engine.ranks.messages import Offered, Read, Reader, ReadWeights, Units
from spotserve.link import accept

Unit = tuple[str, int, int]
"""(parameter, segment, unit); a parameter that is held whole is one unit."""

SHAPES = {"llama": {"num_key_value_heads": 2, "intermediate_size": 48}, "phi3": {"num_key_value_heads": 2, "intermediate_size": 48}}
CATALOGUES = {kind: make_catalogue(tiny_config(kind, **extra), name=kind, dtype=torch.float32) for kind, extra in SHAPES.items()}
SLICES = [
    StageSlice(layers, LAYERS, shard, tensor)
    for pipeline, tensor in product((1, 2, 3), (1, 2, 4))
    for layers in stage_cuts(CATALOGUES["llama"].spec, pipeline)
    for shard in range(tensor)
]


@dataclass(frozen=True)
class Model:
    """A whole model, every value of which is another."""

    catalogue: Catalogue
    values: Mapping[str, torch.Tensor]

    def part(self, name: str, held: Held) -> torch.Tensor:
        cut = self.catalogue.entries[name].cut
        return cut.cut_out(self.values[name], cut.whole, held).clone()

    def held(self, stage_slice: StageSlice) -> HeldWeights:
        needed = self.catalogue.needed(stage_slice)
        return HeldWeights(
            stage_slice,
            {name: self.part(name, held) for name, held in needed.items()},
            {name: self.catalogue.entries[name].cut for name in needed},
        )

    def units(self, stage_slice: StageSlice, *, layer: int | None = None) -> set[Unit]:
        return {
            unit
            for name, held in self.catalogue.needed(stage_slice).items()
            if layer is None or self.catalogue.entries[name].home == layer
            for unit in units_of(name, held)
        }

    def num_bytes(self, units: set[Unit]) -> int:
        return sum(unit_bytes(self.catalogue.entries[name], segment) for name, segment, _ in units)


def units_of(name: str, held: Held) -> set[Unit]:
    if not held:
        return {(name, 0, 0)}
    return {(name, segment, unit) for segment, units in enumerate(held) for unit in units}


def unit_bytes(entry: Entry, segment: int) -> int:
    size = torch.Size(entry.shape).numel() * entry.dtype.itemsize
    if not entry.cut.segments:
        return size
    return size // entry.shape[entry.cut.dim] * entry.cut.segments[segment].unit_size


def make_model(kind: str) -> Model:
    catalogue, first, values = CATALOGUES[kind], 0, {}
    for name, entry in catalogue.entries.items():
        count = torch.Size(entry.shape).numel()
        values[name] = torch.arange(first, first + count, dtype=torch.float32).reshape(entry.shape)
        first += count
    assert first < 2**24, "float32 would round"
    return Model(catalogue, values)


MODELS = {kind: make_model(kind) for kind in SHAPES}


class Files:
    """Gives what it is asked for, and notes it."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.read: list[Unit] = []

    def __call__(self, wanted: Mapping[str, Held]) -> dict[str, torch.Tensor]:
        for name, held in wanted.items():
            self.read += units_of(name, held)
        return {name: self._model.part(name, held) for name, held in wanted.items()}


@pytest.fixture(scope="module")
def peers() -> Iterator[list[Seat]]:
    with seats(2) as made:
        yield made


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_slot_comes_together_from_wherever_its_parts_are(peers: list[Seat], data: st.DataObject) -> None:
    model = MODELS[data.draw(st.sampled_from(sorted(MODELS)), "model")]
    some_slices = st.lists(st.sampled_from(SLICES), max_size=2)
    wanted = data.draw(st.sampled_from(SLICES), "wanted")
    here = data.draw(some_slices, "here")
    there = [data.draw(some_slices, f"peer {index}") for index in range(2)]
    pulls = data.draw(st.lists(st.tuples(st.integers(-1, LAYERS), st.integers(0, 1)), max_size=12), "pulls")

    memory = RankMemory()
    local = [model.held(each) for each in here]
    remote = [(seat, model.held(each)) for seat, slices in zip(peers, there, strict=True) for each in slices]
    for held in local:
        memory.add_weights(held)
    for seat, held in remote:
        seat.memory.add_weights(held)
    readers, files = Readers(secret=SECRET), Files(model)
    try:
        tensors, pulled_bytes = assemble(
            model.catalogue,
            wanted,
            dtype="float32",
            memory=memory,
            pulls=[Pull(layer, peers[index].server.address) for layer, index in pulls],
            readers=readers,
            read_files=files,
        )
    finally:
        readers.close()
        for seat, held in remote:
            seat.memory.drop_weights(held)

    for name, held in model.catalogue.needed(wanted).items():
        assert torch.equal(tensors[name], model.part(name, held)), name
        check_shared(tensors[name], name, held, local)
    missing = model.units(wanted).difference(*(model.units(each) for each in here))
    pulled: set[Unit] = set()
    for layer, index in pulls:
        has = set().union(*(model.units(each, layer=layer) for each in there[index]))
        pulled |= has & missing
    assert pulled_bytes == model.num_bytes(pulled)
    assert sorted(files.read) == sorted(missing - pulled)


def check_shared(value: torch.Tensor, name: str, held: Held, local: list[HeldWeights]) -> None:
    """What is here as it is wanted costs no memory."""
    same = [
        each.tensors[name].data_ptr()
        for each in local
        if name in each.tensors and each.cuts[name].held(each.stage_slice.tensor, each.stage_slice.shard) == held
    ]
    assert not same or value.data_ptr() in same


def test_a_slice_of_rows_of_what_is_here_is_a_view_of_it() -> None:
    model, memory = MODELS["llama"], RankMemory()
    whole = model.held(SLICES[0])
    memory.add_weights(whole)
    shard = StageSlice(range(LAYERS), LAYERS, 1, 2)
    tensors, _ = assemble(
        model.catalogue, shard, dtype="float32", memory=memory, pulls=(), readers=Readers(secret=SECRET), read_files=Files(model)
    )
    name = next(name for name in tensors if name.endswith("0.self_attn.q_proj.weight"))
    assert tensors[name].shape[0] * 2 == whole.tensors[name].shape[0]
    assert tensors[name].untyped_storage().data_ptr() == whole.tensors[name].untyped_storage().data_ptr()


def test_what_is_here_in_the_middle_is_not_pulled_again(peers: list[Seat]) -> None:
    """Shard 1 of 4 becomes the whole: units on both sides of what it has are missing."""
    model, memory, readers, files = MODELS["llama"], RankMemory(), Readers(secret=SECRET), Files(MODELS["llama"])
    middle, whole = StageSlice(range(LAYERS), LAYERS, 1, 4), SLICES[0]
    memory.add_weights(model.held(middle))
    held = model.held(whole)
    peers[0].memory.add_weights(held)
    _, pulled_bytes = assemble(
        model.catalogue,
        whole,
        dtype="float32",
        memory=memory,
        pulls=[Pull(layer, peers[0].server.address) for layer in range(-1, LAYERS + 1)],
        readers=readers,
        read_files=files,
    )
    readers.close()
    peers[0].memory.drop_weights(held)
    assert pulled_bytes == model.num_bytes(model.units(whole) - model.units(middle))
    assert files.read == []


def test_weights_of_another_dtype_are_not_taken(peers: list[Seat]) -> None:
    model, readers, files = MODELS["llama"], Readers(secret=SECRET), Files(MODELS["llama"])
    held = model.held(SLICES[0])
    halves = HeldWeights(held.stage_slice, {name: value.half() for name, value in held.tensors.items()}, held.cuts)
    peers[0].memory.add_weights(halves)
    tensors, pulled_bytes = assemble(
        model.catalogue,
        SLICES[0],
        dtype="float32",
        memory=RankMemory(),
        pulls=[Pull(0, peers[0].server.address)],
        readers=readers,
        read_files=files,
    )
    readers.close()
    peers[0].memory.drop_weights(halves)
    assert pulled_bytes == 0
    assert all(torch.equal(tensors[name], model.values[name]) for name in tensors)


@pytest.mark.parametrize("after", ["the question", "half of the payload"])
def test_a_peer_that_dies_in_the_middle_is_lost_and_nothing_of_it_is_used(after: str) -> None:
    model, memory, files = MODELS["llama"], RankMemory(), Files(MODELS["llama"])
    held = model.held(SLICES[0])
    address, dying = start_dying(held, after)
    readers = Readers(secret=SECRET)
    with pytest.raises(PeerLost):
        assemble(
            model.catalogue,
            SLICES[0],
            dtype="float32",
            memory=memory,
            pulls=[Pull(0, address), Pull(1, address)],
            readers=readers,
            read_files=files,
        )
    dying.join(PATIENCE_S)
    readers.close()
    assert files.read == []
    assert all(memory.parts(name) == [] for name in model.values)
    retried, _ = assemble(model.catalogue, SLICES[0], dtype="float32", memory=memory, pulls=(), readers=readers, read_files=files)
    assert all(torch.equal(retried[name], model.values[name]) for name in retried)


def start_dying(held: HeldWeights, after: str) -> tuple[Address, threading.Thread]:
    """A peer that hangs up in the middle of its first answer."""
    listening = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        with listening:
            link = accept(listening.accept()[0], secret=SECRET, inbound=Reader)
        link.receive()
        asked, _ = link.expecting(Read).receive()
        assert isinstance(asked, ReadWeights)
        if after == "half of the payload":
            parts = [held.tensors[name] for name in asked.names]
            units = tuple(wanted or (Units(0, 1),) for wanted in asked.units)
            whole = b"".join(part.numpy().tobytes() for part in parts)
            message = msgspec.msgpack.encode(Offered(units))
            link.write(struct.pack(">IQ", len(message), len(whole)) + message + whole[: len(whole) // 2])
        link.close()

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    return Address("127.0.0.1", listening.getsockname()[1]), thread


def test_every_home_is_covered_by_every_shape() -> None:
    """The brute force above would not miss a parameter that no slice needs."""
    for model in MODELS.values():
        for pipeline, tensor in product((1, 2, 3), (1, 2, 4)):
            of_shape = [
                each for each in SLICES if each.tensor == tensor and each.layers in stage_cuts(model.catalogue.spec, pipeline)
            ]
            covered = set().union(*(model.units(each) for each in of_shape))
            assert covered == set().union(*(units_of(name, entry.cut.whole) for name, entry in model.catalogue.entries.items()))
            assert all(any(is_at_home(entry.home, each) for each in of_shape) for entry in model.catalogue.entries.values())
