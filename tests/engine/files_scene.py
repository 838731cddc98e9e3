"""Models of random tensors, and a server of byte ranges that counts what it sends."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import msgspec
import torch
from hypothesis import strategies as st
from safetensors.torch import save_file

from spotserve.engine.files.range_cache import Fetch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float64)
Tensors = Mapping[str, torch.Tensor]


def random_tensors(shapes: Mapping[str, Sequence[int]], dtypes: Sequence[torch.dtype] = DTYPES) -> dict[str, torch.Tensor]:
    """Tensors of these shapes, dtypes in turn, every value drawn."""
    generator = torch.Generator().manual_seed(len(shapes))
    return {
        name: torch.randint(-100, 100, tuple(shape), generator=generator).to(dtypes[place % len(dtypes)])
        for place, (name, shape) in enumerate(shapes.items())
    }


def write_model(folder: Path, tensors: Tensors, num_files: int = 1) -> Path:
    """A folder in Hugging Face format: one file, or so many shards and an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "none"}')
    (folder / "tokenizer.json").write_text("{}")
    if num_files == 1:
        save_file(dict(tensors), folder / "model.safetensors")
        return folder
    file_of = {name: f"model-{place % num_files + 1:05}-of-{num_files:05}.safetensors" for place, name in enumerate(tensors)}
    for file in set(file_of.values()):
        save_file({name: tensor for name, tensor in tensors.items() if file_of[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_bytes(msgspec.json.encode({"metadata": {}, "weight_map": file_of}))
    return folder


@st.composite
def parts(draw: st.DrawFn, tensors: Tensors) -> tuple[str, int | None, list[range]]:
    """A part of one of the tensors: any dimension, spans in any order, empty and overlapping ones too."""
    name = draw(st.sampled_from(sorted(tensors)))
    shape = tensors[name].shape
    if not shape or draw(st.booleans()):
        return name, draw(st.sampled_from([None, *range(len(shape))])), []
    dim = draw(st.integers(0, len(shape) - 1))
    ends = st.tuples(st.integers(0, shape[dim]), st.integers(0, shape[dim])).map(lambda pair: range(min(pair), max(pair)))
    return name, dim, draw(st.lists(ends, min_size=1, max_size=4))


def expected(tensors: Tensors, name: str, dim: int | None, spans: Sequence[range]) -> torch.Tensor:
    """The plain twin of `TensorFiles.read`."""
    if dim is None or not spans:
        return tensors[name]
    return torch.cat([tensors[name].narrow(dim, span.start, len(span)) for span in spans], dim)


def same(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether two tensors are equal to the last bit, and of one kind."""
    return got.dtype == wanted.dtype and got.is_contiguous() and torch.equal(got, wanted)


def fetch_from(port: int) -> Fetch:
    """Ranges of the object that a `RangedServer` at `port` serves."""

    def fetch(span: range) -> Iterator[bytes]:
        connection = HTTPConnection("127.0.0.1", port)
        try:
            connection.request("GET", "/object", headers={"Range": f"bytes={span.start}-{span.stop - 1}"})
            answer = connection.getresponse()
            while chunk := answer.read(2**16):
                yield chunk
        finally:
            connection.close()

    return fetch


class RangedServer:
    """Serves `content` by `Range`; remembers the ranges it was asked for and how many bytes of each it sent.

    While `open_gate` is not set, every answer stops after half of its bytes.
    """

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.asked: list[range] = []
        self.sent_bytes = 0
        self.half_sent = threading.Event()
        self.open_gate = threading.Event()
        self.open_gate.set()
        self._lock = threading.Lock()
        scene = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:  # the name is the library's
                first, last = self.headers["Range"].removeprefix("bytes=").split("-")
                span = range(int(first), int(last) + 1)
                self.send_response(206)
                self.send_header("Content-Length", str(len(span)))
                self.end_headers()
                half = len(span) // 2
                scene.send(self, span, slice(0, half))
                scene.half_sent.set()
                scene.open_gate.wait(60)
                scene.send(self, span, slice(half, len(span)))

            def log_message(self, *arguments: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]

    def send(self, handler: BaseHTTPRequestHandler, span: range, part: slice) -> None:
        """Sends a part of what was asked for."""
        with self._lock:
            if part.start == 0:
                self.asked.append(span)
        try:
            handler.wfile.write(self.content[span.start : span.stop][part])
            handler.wfile.flush()
        except OSError:  # the client was killed
            return
        with self._lock:
            self.sent_bytes += part.stop - part.start

    @contextmanager
    def running(self) -> Iterator["RangedServer"]:
        """Serves until the end of the block."""
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.open_gate.set()
            self._server.shutdown()
            self._server.server_close()
            thread.join()
