"""A worker of three devices as it really is: a process with two rank processes, a controller and a gateway that the test plays."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import msgspec
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from worker_scene import FIRST, SECRET, VOCABULARY_SIZE, Ear, Office, submit, undisturbed, until

from spotserve.core.cluster import DeviceId
from spotserve.core.epoch import after_hand_over
from spotserve.core.errors import ChannelClosed
from spotserve.core.messages import (
    Activate,
    Address,
    Attach,
    Deactivate,
    Drain,
    Drained,
    Heartbeat,
    Member,
    Moved,
    Registered,
    Released,
    SequenceAction,
    SequenceMoved,
    SequenceOrder,
    SlotFailed,
    SlotReady,
    Undrain,
    WeightTransfer,
    WorkerEvent,
    WorkerReply,
)
from spotserve.core.plan import Parallel, ReplicaPlan, Slot
from spotserve.system_folder import SystemFolder, SystemRecord
from spotserve.wire import bound_port, connect, listen
from spotserve.worker.options import WorkerOptions

pytestmark = [pytest.mark.anyio, pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")]

DEVICES = 3
LAYERS = 3
SILENCE_S = 3.0  # processes that share few cores with other tests may not run for a second
PROCESS_PATIENCE_S = 60.0
"""For what whole processes do, on a machine that is busy with others."""
WORKER = """
import os, sys, msgspec
from spotserve.worker.app import main
from spotserve.worker.options import WorkerOptions
os._exit(main(msgspec.json.decode(sys.argv[1], type=WorkerOptions)))
"""


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of three layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.25,
        bos_token_id=0,
        eos_token_id=[1, 2],
    )
    folder = tmp_path_factory.mktemp("models") / "deep-llama"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


class Machine:
    """The worker's process, seen from outside."""

    def __init__(self, process: subprocess.Popen[bytes], office: Office, registered: Registered) -> None:
        self.process = process
        self.office = office
        self.registered = registered
        self.gateway = Ear()
        self.hung_up = asyncio.Event()

    @property
    def rank_pids(self) -> list[int]:
        """In the order of devices."""
        pid = self.process.pid
        return sorted(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))

    async def attach(self) -> None:
        """The gateway connects, and notes all that it is told."""
        address = self.registered.address
        self._channel = await connect(address.host, address.port, secret=SECRET, inbound=WorkerReply)
        self._channel.send(Attach(gateway_id="g"))
        self._listening = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        try:
            while True:
                self.gateway.heard.append(await self._channel.receive())
        except ChannelClosed:
            self.hung_up.set()

    def submit(self, **options: object) -> None:
        self._channel.send(submit(**options))  # type: ignore[arg-type]

    def activate(
        self, replica_id: str, *, epoch: int, first_device: int = 0, transfers: tuple[WeightTransfer, ...] = (), **parallel: int
    ) -> tuple[Activate, ...]:
        """Asks for every slot of a replica, on one device after the other; what was asked."""
        replica = ReplicaPlan(replica_id=replica_id, parallel=Parallel(**parallel))
        members = tuple(
            Member(slot, DeviceId("i-1", index), self.registered.ranks[index])
            for index, slot in enumerate(replica.slots, first_device)
        )
        asked = tuple(
            Activate(
                instance_id="i-1",
                device_index=index,
                replica=replica,
                slot=slot,
                plan_epoch=epoch,
                members=members,
                transfers=transfers,
            )
            for index, slot in enumerate(replica.slots, first_device)
        )
        for each in asked:
            self.office.say(each)
        return asked

    async def serve(self, replica_id: str, *, epoch: int, **options: object) -> list[SlotReady]:
        """Asks for a replica and waits until all of it is ready."""
        asked = self.activate(replica_id, epoch=epoch, **options)  # type: ignore[arg-type]
        ready = [await self.office.hears(SlotReady) for _ in asked]
        assert {each.slot for each in ready} == {each.slot for each in asked}
        return ready

    async def submit_to(self, replica_id: str, *, besides: str, **options: object) -> None:
        """Submits while the other replica, which is newer, takes nothing; returns when the answer has begun."""
        assert await self.drained(besides, replica_id) == []
        self.submit(**options)
        await self.heard_tokens(8)
        self.office.say(Undrain(instance_id="i-1", replica_id=besides))

    async def drained(self, source: str, destination: str) -> list[SequenceMoved]:
        """Moves everything from one replica to another; what moved."""
        self.office.say(drain_to(self, source, destination))
        moved: list[SequenceMoved] = []
        while isinstance(message := await self.office.hears(SequenceMoved | Drained), SequenceMoved):  # type: ignore[arg-type]
            moved.append(message)
        return moved

    async def heard_tokens(self, at_least: int) -> None:
        await until(lambda: len(self.gateway.answer().token_ids) >= at_least)


@contextmanager
def started(options: WorkerOptions) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", WORKER, msgspec.json.encode(options).decode()], env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@asynccontextmanager
async def machine(model: Path, folder: SystemFolder, **engine: object) -> AsyncIterator[Machine]:
    """A worker that has registered, with a gateway attached. In the end none of its processes is left."""
    office = Office()
    server = await listen("127.0.0.1", 0, secret=SECRET, inbound=WorkerEvent, on_channel=office.serve, on_refused=print)
    folder.create()
    folder.write(SystemRecord(pid=1, url="", controller=Address("127.0.0.1", bound_port(server)), secret=SECRET))
    options = WorkerOptions(
        instance_id="i-1",
        spot=True,
        zone="z",
        system_folder=str(folder.path),
        engine={"model": str(model), "dtype": "float64", "speculation": "off", "kv_tokens": 2048, **engine},
        worker={"heartbeat_s": 0.05, "rank_silence_s": SILENCE_S},
        store={"url": "none"},
        devices=DEVICES,
    )
    with started(options) as process:
        async with asyncio.timeout(PROCESS_PATIENCE_S):
            made = Machine(process, office, await office.hears(Registered))
        ranks = made.rank_pids
        assert len(ranks) == DEVICES - 1
        await made.attach()
        yield made
        process.kill()
        await until(lambda: not any(map(is_alive, ranks)))
        made._listening.cancel()
        made._channel.close()
        server.close()


def is_alive(pid: int) -> bool:
    """Whether it runs; what has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def drain_to(machine: Machine, source: str, destination: str) -> Drain:
    """Everything goes to another replica of the same worker."""
    move = SequenceOrder(
        request_id="",
        action=SequenceAction.MOVE,
        destination_replica_id=destination,
        destination=machine.registered.address,
        reason="another shape",
    )
    return Drain(instance_id="i-1", replica_id=source, deadline_s=2e9, orders=(), fallback=move)


async def test_a_worker_is_cut_anew_over_its_devices_while_it_answers(deep_model: Path, tmp_path: Path) -> None:
    asked = {"max_tokens": 200, "logprobs": 2, "gaps": True}
    expected = await undisturbed(deep_model, tmp_path, **asked)
    async with machine(deep_model, SystemFolder(tmp_path / "system")) as made:
        assert len(set(made.registered.ranks)) == DEVICES
        first = await made.serve("r-1", epoch=1, pipeline=3)
        assert [ready.pulled_bytes for ready in first] == [0, 0, 0]
        made.submit(request_id="beside", max_tokens=400)
        everything = tuple(
            WeightTransfer(layer, DeviceId("i-1", index), made.registered.ranks[index], 0)
            for index in range(DEVICES)
            for layer in range(-1, LAYERS + 1)
        )
        second = await made.serve("r-2", epoch=2, tensor=2, transfers=everything)
        assert all(0 < ready.pulled_bytes < first[0].model.weight_bytes for ready in second)
        await made.submit_to("r-1", besides="r-2", **asked)
        moved = await made.drained("r-1", "r-2")
        assert "s" in {each.request_id for each in moved}
        assert all(each.destination_replica_id == "r-2" and each.kv_bytes > 0 for each in moved)
        for stage in range(3):
            made.office.say(Deactivate(instance_id="i-1", device_index=stage, slot=Slot("r-1", stage, 0)))
        assert await made.gateway.whole() == expected
        assert len((await made.gateway.whole("beside")).token_ids) == 400
        newer = after_hand_over(FIRST)
        assert Moved(request_id="s", epoch=newer, destination_replica_id="r-2") in made.gateway.of(Moved)
        epochs = [delta.epoch for delta in made.gateway.deltas if delta.request_id == "s"]
        assert epochs == sorted(epochs)
        assert set(epochs) == {FIRST, newer}
        await until_idle(made)


@pytest.mark.parametrize("parallel", [{"pipeline": 2}, {"tensor": 2}, {}])
async def test_a_worker_leads_a_replica_that_is_wholly_in_its_rank_processes(
    deep_model: Path, tmp_path: Path, parallel: dict[str, int]
) -> None:
    asked = {"max_tokens": 200, "logprobs": 2, "gaps": True}
    expected = await undisturbed(deep_model, tmp_path, **asked)
    async with machine(deep_model, SystemFolder(tmp_path / "system")) as made:
        await made.serve("r-1", epoch=1, first_device=1, **parallel)
        await made.serve("r-2", epoch=2, **parallel)
        await made.submit_to("r-1", besides="r-2", **asked)
        assert [moved.request_id for moved in await made.drained("r-1", "r-2")] == ["s"]
        assert await made.gateway.whole() == expected
        await until_idle(made)


async def until_idle(made: Machine) -> None:
    """No sequence runs and no block is held, say the heartbeats. Besides, a rank may say that its replica broke, which another one
    has left already, before it hears that it has to leave, too."""

    def is_idle() -> bool:
        beats = [message for message in made.office.unheard if isinstance(message, Heartbeat)]
        return bool(beats) and not (beats[-1].running or beats[-1].kv_tokens_used)

    await until(is_idle)


@pytest.mark.parametrize("device", [1, 2])
async def test_a_rank_process_that_is_killed_ends_the_worker_and_frees_its_gateway(
    deep_model: Path, tmp_path: Path, device: int
) -> None:
    async with machine(deep_model, SystemFolder(tmp_path / "system")) as made:
        await made.serve("r-1", epoch=1, pipeline=3)
        made.submit(max_tokens=400)
        await made.heard_tokens(4)
        os.kill(made.rank_pids[device - 1], signal.SIGKILL)
        await until(lambda: bool(made.gateway.of(Released)) or made.hung_up.is_set())
        assert await asyncio.to_thread(made.process.wait, PROCESS_PATIENCE_S) == 1


async def test_a_rank_process_that_hangs_is_noticed_by_its_silence_and_can_serve_again(deep_model: Path, tmp_path: Path) -> None:
    expected = await undisturbed(deep_model, tmp_path)
    async with machine(deep_model, SystemFolder(tmp_path / "system")) as made:
        await made.serve("r-1", epoch=1, pipeline=3)
        made.submit(request_id="t", max_tokens=400)
        await until(lambda: len(made.gateway.answer("t").token_ids) >= 4)
        hung = made.rank_pids[0]
        os.kill(hung, signal.SIGSTOP)
        try:
            await until(lambda: bool(made.gateway.of(Released)))
            failed = {(await made.office.hears(SlotFailed)).slot.stage for _ in range(2)}
            assert failed == {0, 2}, "those that are not stopped say so"
        finally:
            os.kill(hung, signal.SIGCONT)
        last = await made.office.hears(SlotFailed)
        assert (last.slot.stage, last.is_permanent) == (1, False)
        await made.serve("r-1", epoch=2, pipeline=3)
        made.submit()
        assert await made.gateway.whole() == expected


async def test_an_idle_replica_notices_a_rank_that_hangs(deep_model: Path, tmp_path: Path) -> None:
    async with machine(deep_model, SystemFolder(tmp_path / "system")) as made:
        await made.serve("r-1", epoch=1, pipeline=2)
        os.kill(made.rank_pids[0], signal.SIGSTOP)
        try:
            failed = await made.office.hears(SlotFailed)
        finally:
            os.kill(made.rank_pids[0], signal.SIGCONT)
        assert (failed.slot.stage, failed.is_permanent) == (0, False)
        assert "no sign of life" in failed.reason
        assert (await made.office.hears(SlotFailed)).slot.stage == 1


async def test_rank_processes_end_with_their_worker(deep_model: Path, tmp_path: Path) -> None:
    async with machine(deep_model, SystemFolder(tmp_path / "system")) as made:
        await made.serve("r-1", epoch=1, pipeline=3)
        ranks = made.rank_pids
        made.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(made.process.wait, PROCESS_PATIENCE_S) == 0
        await until(lambda: not any(map(is_alive, ranks)))
