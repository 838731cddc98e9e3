"""A folder of weights, read in parts: equal to the library's own full load, and only what was asked for is read."""

import json
import mmap
import os
import struct
from pathlib import Path

import pytest
import torch
from files_scene import expected, parts, random_tensors, same, write_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from spotserve.core.errors import ModelError
from spotserve.engine.files.header import DTYPES, parse_header
from spotserve.engine.files.open import open_files
from spotserve.engine.files.tensor_files import TensorPart

SHAPES = {"a": (6, 4), "b": (5,), "scalar": (), "cube": (3, 4, 5), "empty": (0, 3), "long": (64, 3), "column": (7, 1)}
MODEL = "model.safetensors"


@pytest.fixture(scope="module", params=[1, 3], ids=["one file", "three shards"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("local") / "model", random_tensors(SHAPES), request.param)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_any_part_is_what_the_library_loads(model: Path, data: st.DataObject) -> None:
    whole = {name: tensor for file in model.glob("*.safetensors") for name, tensor in load_file(file).items()}
    files = open_files(str(model))
    name, dim, spans = data.draw(parts(whole))
    files.prefetch([TensorPart(name, dim, spans)])
    got = files.read(name, dim, spans)
    assert same(got, expected(whole, name, dim, spans))
    assert files.bytes_read == got.nbytes
    assert set(files.names()) == set(whole)
    assert files.shape(name) == tuple(whole[name].shape)
    assert files.dtype(name) == whole[name].dtype


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype_of_the_table_reads(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.arange(12).reshape(4, 3).to(dtype)
    write_model(tmp_path, {"t": tensor})
    got = open_files(str(tmp_path)).read("t", 0, [range(1, 3)])
    assert got.dtype == dtype
    assert torch.equal(got.view(torch.uint8), tensor[1:3].view(torch.uint8))


def test_only_the_pages_of_a_part_are_read(tmp_path: Path) -> None:
    """What the library's slices promise nowhere and must keep: 1 MiB out of 64 takes 1 MiB of memory, and of the disk no more
    than the kernel reads ahead."""
    write_model(tmp_path, {"t": torch.zeros(64, 2**18)})
    descriptor = os.open(tmp_path / MODEL, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    size_bytes = os.fstat(descriptor).st_size
    os.close(descriptor)
    resident_before, read_before = resident_bytes(), disk_bytes_read()
    files = open_files(str(tmp_path))
    part = files.read("t", 0, [range(30, 31)])
    assert float(part.sum()) == 0
    assert part.nbytes == 2**20
    assert resident_bytes() - resident_before < size_bytes // 8
    assert disk_bytes_read() - read_before < size_bytes // 2


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def disk_bytes_read() -> int:
    (line,) = (line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("read_bytes"))
    return int(line.split()[1])


def test_one_run_of_rows_is_a_view_of_the_file_and_stripes_are_a_copy_of_their_own(tmp_path: Path) -> None:
    write_model(tmp_path, {"t": torch.arange(4096.0).reshape(64, 64)})
    files = open_files(str(tmp_path))
    whole, run = files.read("t"), files.read("t", 0, [range(2, 4), range(4, 6)])
    assert run.data_ptr() == whole[2:].data_ptr()
    stripe = files.read("t", 1, [range(2, 4)])
    assert stripe.untyped_storage().nbytes() == stripe.nbytes


def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    write_model(tmp_path, {"t": torch.ones(8)})
    files = open_files(str(tmp_path))
    files.read("t").zero_()
    assert torch.equal(load_file(tmp_path / MODEL)["t"], torch.ones(8))
    files.close()


def test_file_whose_header_is_not_padded_gives_aligned_tensors(tmp_path: Path) -> None:
    header = json.dumps({"t": {"dtype": "F64", "shape": [3], "data_offsets": [0, 24]}}).encode()
    header += b" " * ((-len(header)) % 8 + 3)
    write_model(tmp_path, {})
    (tmp_path / MODEL).write_bytes(
        struct.pack("<Q", len(header)) + header + torch.arange(3.0, dtype=torch.float64).numpy().tobytes()
    )
    got = open_files(str(tmp_path)).read("t", 0, [range(1, 3)])
    assert got.data_ptr() % 8 == 0
    assert got.tolist() == [1, 2]


def test_only_files_that_hold_wanted_tensors_need_to_be_there(tmp_path: Path) -> None:
    tensors = random_tensors({"a": (2, 2), "b": (3, 3), "c": (4, 4)})
    write_model(tmp_path, tensors, 3)
    gone = "model-00002-of-00003.safetensors"
    (tmp_path / gone).unlink()
    with pytest.raises(ModelError, match=rf"index\.json: names {gone}, which is not there"):
        open_files(str(tmp_path))
    files = open_files(str(tmp_path), ["a", "c"])
    assert same(files.read("c"), tensors["c"])
    with pytest.raises(ModelError, match=gone):
        files.read("b")
    with pytest.raises(ModelError, match="no tensor d and 1 others"):
        open_files(str(tmp_path), ["a", "d", "e"])


@pytest.mark.parametrize("name", ["pytorch_model.safetensors", "consolidated.safetensors"])
def test_older_names_of_a_single_file_are_found(tmp_path: Path, name: str) -> None:
    write_model(tmp_path, {"t": torch.ones(2)})
    (tmp_path / MODEL).rename(tmp_path / name)
    assert open_files(str(tmp_path)).names() == {"t"}


def test_the_demo_model_reads() -> None:
    folder = Path(__file__).parents[2] / "spotserve" / "demo" / "models" / "target"
    files = open_files(str(folder))
    whole = load_file(folder / MODEL)
    assert set(files.names()) == set(whole)
    assert all(same(files.read(name), tensor) for name, tensor in whole.items())
    assert files.config_folder == folder


class TestRefusals:
    """Each names what is wrong, where, and what was expected."""

    @pytest.mark.parametrize(
        ("model", "says"),
        [
            ("/nowhere/at/all", "there is no such folder"),
            ("./nowhere", "there is no such folder"),
            ("ftp://host/model", r"expected a folder, s3://BUCKET/PREFIX or a hub id"),
            (__file__, "Not a directory"),
            ("x" * 5000, "cannot be read: .*too long"),
            ("~nobody-of-this-name/model", "cannot be read"),
        ],
    )
    def test_no_folder(self, model: str, says: str) -> None:
        with pytest.raises(ModelError, match=says):
            open_files(model)

    def test_no_weights(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"no config\.json"):
            open_files(str(tmp_path))
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(ModelError, match=r"no weights: expected model\.safetensors"):
            open_files(str(tmp_path))
        (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"")
        with pytest.raises(ModelError, match=r"pytorch_model-00001-of-00002\.bin is a pickle.*convert to safetensors"):
            open_files(str(tmp_path))
        for name in ("one", "two"):
            (tmp_path / f"{name}.safetensors").write_bytes(b"")
        with pytest.raises(ModelError, match="cannot choose among one"):
            open_files(str(tmp_path))

    @pytest.mark.parametrize("kept", [0, 7, 8, 40, -1])
    def test_truncated(self, tmp_path: Path, kept: int) -> None:
        write_model(tmp_path, random_tensors({"a": (6, 4), "b": (5,)}))
        whole = (tmp_path / MODEL).read_bytes()
        (tmp_path / MODEL).write_bytes(whole[:kept])
        with pytest.raises(ModelError, match=rf"{MODEL}: (truncated|\d+ bytes are no safetensors)"):
            open_files(str(tmp_path))

    def test_bytes_that_nothing_describes(self, tmp_path: Path) -> None:
        write_model(tmp_path, random_tensors({"a": (6, 4)}))
        with (tmp_path / MODEL).open("ab") as file:
            file.write(b"x")
        with pytest.raises(ModelError, match="its header describes"):
            open_files(str(tmp_path))

    @pytest.mark.parametrize(
        ("entry", "says"),
        [
            ({"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 20]}, "needs 24 bytes, its offsets hold 20"),
            ({"dtype": "F32", "shape": [2, 3], "data_offsets": [8, 32]}, "expected"),
            ({"dtype": "F32", "shape": [2, -3], "data_offsets": [0, 24]}, "negative"),
            ({"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 24]}, "needs"),
            ({"dtype": "F4", "shape": [48], "data_offsets": [0, 24]}, "has dtype 'F4', expected one of F64"),
            ({"dtype": "F32", "shape": [2, 3], "data_offsets": [0]}, "damaged"),
            ({"dtype": "F32", "shape": "six", "data_offsets": [0, 24]}, "damaged"),
            ([], "damaged"),
        ],
    )
    def test_header_that_lies(self, tmp_path: Path, entry: object, says: str) -> None:
        write_model(tmp_path, {})
        header = json.dumps({"t": entry}).encode()
        (tmp_path / MODEL).write_bytes(struct.pack("<Q", len(header)) + header + bytes(24))
        with pytest.raises(ModelError, match=says):
            open_files(str(tmp_path))

    def test_header_that_claims_to_be_huge(self, tmp_path: Path) -> None:
        write_model(tmp_path, {})
        (tmp_path / MODEL).write_bytes(struct.pack("<Q", 2**63) + bytes(100))
        with pytest.raises(ModelError, match="no safetensors file"):
            open_files(str(tmp_path))

    @given(st.binary(max_size=200), st.integers(0, 300))
    def test_no_bytes_crash_the_parser(self, header: bytes, file_bytes: int) -> None:
        try:
            places = parse_header(header, file_bytes, "m")
        except ModelError:
            return
        assert all(place.start_byte + place.num_bytes <= file_bytes for place in places.values())

    @pytest.mark.parametrize(
        "index", ["{", "[]", '{"weight_map": {"a": "../other/model.safetensors"}}', '{"weight_map": {"a": "/x.bin"}}']
    )
    def test_damaged_index(self, tmp_path: Path, index: str) -> None:
        write_model(tmp_path, random_tensors({"a": (2,), "b": (2,)}), 2)
        (tmp_path / "model.safetensors.index.json").write_text(index)
        with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json: (damaged|names)"):
            open_files(str(tmp_path))

    def test_index_that_names_the_wrong_file(self, tmp_path: Path) -> None:
        write_model(tmp_path, random_tensors({"a": (2,), "b": (2,)}), 2)
        save_file({"other": torch.ones(1)}, tmp_path / "model-00002-of-00002.safetensors")
        with pytest.raises(ModelError, match=r"says that b is in model-00002-of-00002\.safetensors"):
            open_files(str(tmp_path))

    def test_file_that_cannot_be_opened(self, tmp_path: Path) -> None:
        write_model(tmp_path, random_tensors({"a": (2,)}))
        (tmp_path / MODEL).unlink()
        (tmp_path / MODEL).symlink_to("blob that was removed")
        with pytest.raises(ModelError, match=rf"{MODEL}: cannot be read: No such file"):
            open_files(str(tmp_path))

    def test_tensor_or_indices_that_are_not_there(self, tmp_path: Path) -> None:
        files = open_files(str(write_model(tmp_path, random_tensors({"a": (2, 3)}))))
        with pytest.raises(ModelError, match="no tensor b"):
            files.read("b")
        with pytest.raises(ModelError, match=r"tensor a has shape \[2, 3\]: indices 0 to 4 of dimension 1 are wanted, it has 3"):
            files.read("a", 1, [range(4)])
