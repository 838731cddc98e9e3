"""Weights in S3-compatible storage, against moto's server behind a relay that counts and breaks connections."""

import importlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from files_scene import Tensors, expected, parts, random_tensors, same, write_model
from hypothesis import HealthCheck, given, settings

from spotserve.core.errors import ModelError
from spotserve.engine.files.cache_folder import CacheFolder
from spotserve.engine.files.cached_file import GAP_BYTES
from spotserve.engine.files.open import open_files
from spotserve.engine.files.range_log import RangeLog
from spotserve.engine.files.tensor_files import TensorFiles, TensorPart

boto3: Any = pytest.importorskip("boto3", reason="the client of S3 is not installed")
moto_server: Any = pytest.importorskip("moto.server", reason="no S3 on this machine: moto[server] is not installed")

SHAPES = {"a": (6, 4), "b": (5,), "scalar": (), "cube": (3, 4, 5), "empty": (0, 3), "long": (700, 300), "wide": (300, 700)}

RANK = """
import sys
from spotserve.engine.files.open import open_files

shard = int(sys.argv[2])
files = open_files(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for name in sorted(files.names()):
    shape = files.shape(name)
    dim = len(shape) - 1
    if dim < 0:
        files.read(name)
    else:
        half = shape[dim] // 2
        files.read(name, dim, [range(0, half) if shard == 0 else range(half, shape[dim])])
print(files.bytes_read, flush=True)
"""


class Relay:
    """Passes connections on to `port`; counts requests and bytes, and cuts a connection where it is told to."""

    def __init__(self, port: int) -> None:
        self._target = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.num_requests = 0
        self.sent_bytes = 0
        self.cuts: list[int] = []
        """Of the next connections that carry an answer: after how many bytes of it each breaks."""
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(10)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
                for job in (self._pass_requests, self._pass_answers):
                    thread = threading.Thread(target=job, args=(client, server), daemon=True)
                    self._threads.append(thread)
                    thread.start()

    def _pass_requests(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(2**16):
                self.num_requests += data.startswith(b"GET ")
                server.sendall(data)
        with suppress(OSError):
            server.shutdown(socket.SHUT_WR)

    def _pass_answers(self, client: socket.socket, server: socket.socket) -> None:
        left_bytes: int | None = None
        with suppress(OSError), client, server:
            while data := server.recv(2**16):
                if self.cuts and b" 206 " in data[:20]:
                    left_bytes = self.cuts.pop(0)
                if left_bytes is not None:
                    data, left_bytes = data[:left_bytes], left_bytes - len(data)
                self.sent_bytes += len(data)
                client.sendall(data)
                if left_bytes is not None and left_bytes <= 0:
                    client.shutdown(socket.SHUT_RDWR)
                    return


@pytest.fixture(scope="module")
def store() -> Iterator[int]:
    """Port of an S3 on this machine."""
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture
def relay(store: int) -> Iterator[Relay]:
    relay = Relay(store)
    yield relay
    relay.close()


@pytest.fixture(autouse=True)
def environment(relay: Relay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", relay.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "anyone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "anything")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "absent"))
    monkeypatch.setenv("SPOTSERVE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def client(store: int) -> Iterator[Any]:
    client = boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{store}",
        aws_access_key_id="owner",
        aws_secret_access_key="secret",
        region_name="us-east-1",
    )
    yield client
    client.close()


@pytest.fixture
def upload(client: Any, tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    """Puts a model into a bucket of the test's own; the result is its URL."""

    def put(tensors: Tensors, num_files: int = 1, prefix: str = "models/tiny") -> str:
        bucket = f"test-{abs(hash(request.node.nodeid)):x}"
        client.create_bucket(Bucket=bucket)
        for path in write_model(tmp_path / "model", tensors, num_files).iterdir():
            client.upload_file(str(path), bucket, f"{prefix}/{path.name}".lstrip("/"))
        return f"s3://{bucket}/{prefix}".rstrip("/")

    return put


def place_of(url: str) -> dict[str, str]:
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    return {"Bucket": bucket, "Key": f"{prefix}/model.safetensors"}


@pytest.fixture
def opened() -> Iterator[list[TensorFiles]]:
    """What the test opens is closed at its end."""
    files: list[TensorFiles] = []
    yield files
    for each in files:
        each.close()


@pytest.fixture
def open_model(opened: list[TensorFiles]) -> Any:
    def open_one(url: str) -> TensorFiles:
        opened.append(open_files(url))
        return opened[-1]

    return open_one


@pytest.mark.parametrize("num_files", [1, 3])
@pytest.mark.parametrize("prefix", ["models/tiny", ""])
def test_any_part_is_what_was_uploaded(upload: Any, open_model: Any, num_files: int, prefix: str) -> None:
    tensors = random_tensors(SHAPES)
    files = open_model(upload(tensors, num_files, prefix))
    assert set(files.names()) == set(tensors)
    assert (files.config_folder / "tokenizer.json").read_text() == "{}"

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.nested_given])
    @given(parts(tensors))
    def check(part: tuple[str, int | None, list[range]]) -> None:
        name, dim, spans = part
        assert same(files.read(name, dim, spans), expected(tensors, name, dim, spans))
        assert files.shape(name) == tuple(tensors[name].shape)
        assert files.dtype(name) == tensors[name].dtype

    check()


def test_only_the_bytes_of_a_part_come(upload: Any, open_model: Any, relay: Relay) -> None:
    tensors = {"big": torch.arange(2**22, dtype=torch.int32).reshape(2**11, 2**11), "other": torch.zeros(2**20)}
    files = open_model(upload(tensors))
    files.shape("big")
    opening = files.bytes_read
    assert opening <= 2**16
    got = files.read("big", 0, [range(1000, 1100)])
    assert same(got, tensors["big"][1000:1100])
    assert files.bytes_read == opening + got.nbytes
    files.read("big", 0, [range(1050, 1100)])
    assert files.bytes_read == opening + got.nbytes, "it was there"
    assert relay.sent_bytes < 2 * got.nbytes


def test_columns_are_one_request_and_near_tensors_too(upload: Any, open_model: Any, relay: Relay) -> None:
    tensors = random_tensors({f"t{place:02}": (100, 64) for place in range(20)}, [torch.float32])
    files = open_model(upload(tensors))
    files.shape("t00")
    before = relay.num_requests
    files.read("t19", 1, [range(32)])
    assert relay.num_requests == before + 1
    files.prefetch(TensorPart(name, 1, [range(32)]) for name in tensors)
    assert relay.num_requests == before + 2
    brought = files.bytes_read
    assert all(same(files.read(name, 1, [range(32)]), tensor[:, :32]) for name, tensor in tensors.items())
    assert files.bytes_read == brought


def test_rows_longer_than_the_gap_are_cut_out_of_each_row(upload: Any, open_model: Any) -> None:
    tensors = {"t": torch.arange(3 * 2 * GAP_BYTES, dtype=torch.int32).reshape(3, -1)}
    files = open_model(upload(tensors))
    files.shape("t")
    opening = files.bytes_read
    got = files.read("t", 1, [range(GAP_BYTES, GAP_BYTES + 1000)])
    assert same(got, tensors["t"][:, GAP_BYTES : GAP_BYTES + 1000])
    assert files.bytes_read == opening + got.nbytes


def test_two_ranks_together_bring_each_byte_once(upload: Any, tmp_path: Path, relay: Relay) -> None:
    tensors = random_tensors({f"t{place}": (512, 512) for place in range(6)}, [torch.float32])
    url = upload(tensors, 2)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, url, str(shard)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        for shard in range(2)
    ]
    for rank in ranks:
        assert rank.stdout is not None
        assert rank.stdout.readline() == "ready\n"
    brought = [int(rank.communicate("\n", 60)[0]) for rank in ranks]
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors")}
    logs = list((tmp_path / "cache").glob("*/present"))
    present = [RangeLog(log, log.with_name("data").stat().st_size).present() for log in logs]
    assert sum(brought) == sum(len(span) for spans in present for span in spans)
    assert 0.99 * sum(sizes.values()) < sum(brought) <= sum(sizes.values())
    assert relay.sent_bytes < 1.1 * sum(sizes.values())


def test_broken_connections_are_picked_up_where_they_broke(
    upload: Any, open_model: Any, relay: Relay, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = {"t": torch.arange(2**20, dtype=torch.int32)}
    files = open_model(upload(tensors))
    files.shape("t")
    opening = files.bytes_read
    relay.cuts = [2000, 0, 3_000_000]
    before = relay.sent_bytes
    assert same(files.read("t"), tensors["t"])
    assert "broke off at byte" in caplog.text
    assert relay.sent_bytes - before < 1.2 * tensors["t"].nbytes
    assert files.bytes_read <= opening + tensors["t"].nbytes


def test_network_that_stays_broken_is_an_error(upload: Any, open_model: Any, relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    files = open_model(upload({"t": torch.arange(2**20, dtype=torch.int32)}))
    files.shape("t")
    monkeypatch.setattr("spotserve.engine.files.s3_files._FIRST_PAUSE_S", 0.001)
    relay.cuts = [2000] * 1000
    with pytest.raises(ModelError, match=r"model\.safetensors: broke off at byte \d+"):
        files.read("t")


@pytest.mark.parametrize("deleted", [False, True])
def test_object_that_changes_during_the_load_is_refused(upload: Any, open_model: Any, client: Any, deleted: bool) -> None:
    tensors = {"t": torch.arange(2**20, dtype=torch.int32)}
    url = upload(tensors)
    files = open_model(url)
    files.read("t", 0, [range(10)])
    if deleted:
        client.delete_object(**place_of(url))
    else:
        client.put_object(**place_of(url), Body=b"another")
    with pytest.raises(ModelError, match=r"model\.safetensors: changed or deleted while it was being loaded"):
        files.read("t")


def test_new_version_is_not_taken_for_the_old_one(upload: Any, open_model: Any, tmp_path: Path) -> None:
    old, new = {"t": torch.zeros(100)}, {"t": torch.ones(100)}
    assert same(open_model(upload(old)).read("t"), old["t"])
    assert same(open_model(upload(new)).read("t"), new["t"])


def test_what_is_in_use_stays_and_goes_afterwards(upload: Any, tmp_path: Path) -> None:
    files = open_files(upload({"t": torch.arange(2**20, dtype=torch.int32)}))
    kept = files.read("t")
    cache = CacheFolder(tmp_path / "cache")
    assert cache.remove_unused() == 0
    files.close()
    assert cache.remove_unused() > 0
    assert not files.config_folder.exists()
    assert torch.equal(kept, torch.arange(2**20, dtype=torch.int32)), "what was read stays valid"


def test_public_bucket_needs_no_credentials(upload: Any, open_model: Any, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    url = upload({"t": torch.ones(3)})
    bucket = place_of(url)["Bucket"]
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for each in client.list_objects_v2(Bucket=bucket)["Contents"]:
        with pytest.raises(ModelError, match=r"cannot be read: .*Forbidden"):
            open_model(url).names()
        client.put_object_acl(Bucket=bucket, Key=each["Key"], ACL="public-read")
    assert open_model(url).names() == {"t"}


class TestRefusals:
    """Each names what is wrong, where, and what was expected."""

    @pytest.mark.parametrize(
        ("url", "says"),
        [
            ("s3://", "expected s3://BUCKET/PREFIX"),
            ("s3://no-such-bucket/m", "s3://no-such-bucket/m: cannot be listed: .*NoSuchBucket"),
        ],
    )
    def test_no_bucket(self, url: str, says: str) -> None:
        with pytest.raises(ModelError, match=says):
            open_files(url)

    def test_no_model(self, upload: Any, client: Any) -> None:
        url = upload({"t": torch.ones(3)})
        place = place_of(url)
        for prefix in (url + "/deeper", url.rpartition("/")[0]):
            with pytest.raises(ModelError, match=f"{prefix}: no object directly below this prefix"):
                open_files(prefix)
        client.put_object(Bucket=place["Bucket"], Key="models/readme.txt", Body=b"")
        with pytest.raises(ModelError, match=r"no config\.json"):
            open_files(url.rpartition("/")[0])
        client.delete_object(**place_of(url))
        with pytest.raises(ModelError, match="no weights: expected"):
            open_files(url)
        client.put_object(Bucket=place["Bucket"], Key=place["Key"].replace("model.safetensors", "pytorch_model.bin"), Body=b"")
        with pytest.raises(ModelError, match=r"pytorch_model\.bin is a pickle.*convert to safetensors"):
            open_files(url)

    def test_absent_shard(self, upload: Any, client: Any) -> None:
        url = upload(random_tensors({"a": (2,), "b": (2,)}), 2)
        place = place_of(url)
        gone = "model-00002-of-00002.safetensors"
        client.delete_object(Bucket=place["Bucket"], Key=place["Key"].replace("model.safetensors", gone))
        with pytest.raises(ModelError, match=f"names {gone}, which is not there"):
            open_files(url)
        open_files(url, ["a"]).close()

    @pytest.mark.parametrize("kept", [5, 30, -1])
    def test_truncated(self, upload: Any, client: Any, open_model: Any, tmp_path: Path, kept: int) -> None:
        url = upload(random_tensors({"a": (200, 3)}))
        client.put_object(**place_of(url), Body=(tmp_path / "model" / "model.safetensors").read_bytes()[:kept])
        with pytest.raises(ModelError, match=r"s3://.*model\.safetensors: (truncated|5 bytes are no safetensors)"):
            open_model(url).names()

    def test_client_that_is_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        importlib.import_module("spotserve.engine.files.s3_files")
        monkeypatch.delitem(sys.modules, "spotserve.engine.files.s3_files")
        monkeypatch.setitem(sys.modules, "boto3", None)
        with pytest.raises(ModelError, match=r"pip install 'spotserve\[s3\]'"):
            open_files("s3://bucket/model")
