"""The weights of one slice out of files: the same as the library loads, and no byte more than needed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures import EXPERTS, GROUPED, SERVED, Architecture
from safetensors.torch import load_file, save_file
from stage_scene import LAYERS, cut_weights, random_model, slices, tiny_config

from spotserve.config import EngineSettings
from spotserve.core.errors import ModelError
from spotserve.engine import weights as weights_module
from spotserve.engine.cuts import StageSlice
from spotserve.engine.files.open import open_files
from spotserve.engine.files.tensor_files import TensorFiles
from spotserve.engine.weights import open_model, read_weights

Save = Callable[..., tuple[Path, torch.nn.Module]]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def save(model_type: str, dtype: torch.dtype = torch.float32, **settings: object) -> tuple[Path, torch.nn.Module]:
        model = random_model(tiny_config(model_type, **settings), dtype)
        model.save_pretrained(tmp_path, max_shard_size="30KB")  # type: ignore[operator]
        return tmp_path, model

    return save


@pytest.mark.parametrize("architecture", SERVED, ids=lambda architecture: architecture.model_type)
def test_every_slice_is_the_librarys_part(architecture: Architecture, save: Save) -> None:
    """From several files, converted to another dtype, and with experts fused that are apart in the files."""
    folder, library = save(architecture.model_type, torch.bfloat16, **architecture.settings)
    model = open_model(EngineSettings(model=str(folder)))
    whole = {name: tensor.float() for name, tensor in library.state_dict().items()}
    for part in (part for pipeline, tensor in ((1, 1), (2, 2)) for stage in slices(pipeline, tensor) for part in stage):
        read = read_weights(model, model.catalogue.needed(part))
        expected = cut_weights(model.catalogue, whole, part)
        assert read.keys() == expected.keys()
        assert all(torch.equal(read[name], expected[name]) for name in expected)


def test_only_the_bytes_of_the_slice_are_read(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = save("mixtral", **EXPERTS)
    model = open_model(EngineSettings(model=str(folder)))
    opened: list[TensorFiles] = []

    def watch(*args: object, **kwargs: object) -> TensorFiles:
        opened.append(open_files(*args, **kwargs))  # type: ignore[arg-type]
        return opened[-1]

    monkeypatch.setattr(weights_module, "open_files", watch)
    for part in (part for stage in slices(3, 2) for part in stage):
        opened.clear()
        read_weights(model, model.catalogue.needed(part))
        assert sum(files.bytes_read for files in opened) == model.catalogue.needed_bytes(part)


def test_some_units_of_a_parameter(save: Save) -> None:
    """What a re-cut misses: other units than a slice's."""
    folder, library = save("phi3", **GROUPED, original_max_position_embeddings=128)
    name = "model.layers.1.self_attn.qkv_proj.weight"
    whole = library.state_dict()[name]  # four query heads, two key heads, two value heads, of eight rows each
    read = read_weights(open_model(EngineSettings(model=str(folder))), {name: (range(1, 3), range(0), range(1, 2))})
    assert torch.equal(read[name], torch.cat((whole[8:24], whole[56:64])))


def test_both_ends_of_a_tied_embedding_are_one_tensor(save: Save) -> None:
    folder, _ = save("gemma2", **GROUPED)
    model = open_model(EngineSettings(model=str(folder)))
    read = read_weights(model, model.catalogue.needed(StageSlice(range(LAYERS), LAYERS)))
    assert read["lm_head.weight"].data_ptr() == read["model.embed_tokens.weight"].data_ptr()
    last = read_weights(model, model.catalogue.needed(StageSlice(range(2, LAYERS), LAYERS)))
    assert torch.equal(last["lm_head.weight"], read["lm_head.weight"])
    assert "model.embed_tokens.weight" not in last


def test_names_of_old_files_are_understood(save: Save) -> None:
    """GPT-2's files name parameters from below the model."""
    folder, library = save("gpt2")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    tensors = {
        name.removeprefix("transformer."): tensor for name, tensor in library.state_dict().items() if name != "lm_head.weight"
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    model = open_model(EngineSettings(model=str(folder)))
    read = read_weights(model, model.catalogue.needed(StageSlice(range(LAYERS), LAYERS)))
    assert torch.equal(read["transformer.h.0.attn.c_attn.weight"], library.state_dict()["transformer.h.0.attn.c_attn.weight"])


@pytest.mark.parametrize(("generation", "expected"), [(None, (1,)), ({}, (1,)), ({"eos_token_id": [4, 5]}, (4, 5))])
def test_what_ends_text(save: Save, generation: dict[str, object] | None, expected: tuple[int, ...]) -> None:
    folder, _ = save("llama", **GROUPED)
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    assert open_model(EngineSettings(model=str(folder))).end_token_ids == expected


def test_a_missing_weight_is_refused(save: Save) -> None:
    folder, _ = save("gpt2")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = "transformer.h.1.ln_1.weight"
    file = folder / content["weight_map"].pop(name)
    index.write_text(json.dumps(content))
    kept = {key: tensor for key, tensor in load_file(file).items() if key != name}
    save_file(kept, file)
    with pytest.raises(ModelError, match=r"its files have no transformer\.h\.1\.ln_1\.weight"):
        open_model(EngineSettings(model=str(folder)))


def test_weights_of_another_shape_are_refused(save: Save) -> None:
    folder, _ = save("llama", **GROUPED)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    model = open_model(EngineSettings(model=str(folder)))
    with pytest.raises(ModelError, match=r"gate_proj\.weight should be \[64, 32\] in its files, found \[48, 32\]"):
        read_weights(model, model.catalogue.needed(StageSlice(range(LAYERS), LAYERS)))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"model_type": "vit"}, "the library cannot build it"),
        ({"model_type": "nobody knows"}, "cannot be loaded"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "mxfp4"}}, r"quantised \(mxfp4\)"),
    ],
)
def test_other_models_are_refused(tmp_path: Path, content: dict[str, object], reason: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(content))
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=reason):
        open_model(EngineSettings(model=str(tmp_path)))
