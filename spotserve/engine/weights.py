"""From a model's name to what the system knows of it, and to the weights of one rank.

Opening a model reads its configuration and the names in its files; the weights themselves are read by `read_weights`, and only
the byte ranges of a rank's slice. Files in another dtype are converted on the way in. What cannot be loaded or served is a
`ModelError` that names model and reason.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import AutoConfig, PreTrainedConfig

from spotserve.config import EngineSettings
from spotserve.core.errors import ModelError
from spotserve.engine.catalogue import Catalogue, Held, make_catalogue
from spotserve.engine.dtypes import DTYPES
from spotserve.engine.files.open import open_files
from spotserve.engine.files.tensor_files import TensorFiles
from spotserve.engine.recipes import Part, Recipe, make_recipes
from spotserve.engine.skeleton import BUILD_ERRORS, build_skeleton


@dataclass(frozen=True, slots=True)
class OpenModel:
    """A causal language model on disk, on the hub or in a store, of which nothing is in memory yet."""

    model: str
    """Where it is: a folder, a hub id, an S3 address."""
    catalogue: Catalogue
    recipes: Mapping[str, Recipe]
    """Of every parameter, what its values are in the files."""
    end_token_ids: tuple[int, ...]
    """What ends text by itself, as the model's configuration says."""


def open_model(settings: EngineSettings) -> OpenModel:
    """Opens `settings.model`.

    Raises:
        ModelError: it cannot be read, is no causal language model that this engine can serve, or lacks a weight.
    """
    files = open_files(settings.model, wanted_names=())
    try:
        config = _config(settings.model, files)
        catalogue = make_catalogue(config, name=settings.model_name, dtype=DTYPES[settings.dtype])
        found = make_recipes(build_skeleton(config, catalogue.dtype), files.names())
        recipes = {name: _recipe(name, found, catalogue, settings.model) for name in catalogue.entries}
        return OpenModel(settings.model, catalogue, recipes, _end_token_ids(files, config))
    finally:
        files.close()


def read_weights(model: OpenModel, wanted: Mapping[str, Held]) -> dict[str, torch.Tensor]:
    """Parts of parameters; only their byte ranges are read.

    Args:
        model: an open model.
        wanted: by parameter the units of each segment, as `Catalogue.needed` gives them, or fewer; a parameter that is not cut
            has none.

    Returns:
        Per parameter its segments' units one after the other, in the catalogue's dtype.

    Raises:
        ModelError: a file cannot be read, or a weight in it has another shape than the module's.
    """
    catalogue = model.catalogue
    shared = {name: source for name in wanted if (source := _same_tensor(model, name)) in wanted}
    with _Reader(model, [name for name in wanted if name not in shared]) as reader:
        reader.prefetch(wanted)
        tensors = {name: reader.read(name, held) for name, held in wanted.items() if name not in shared}
    for name, source in shared.items():  # both ends of a tied embedding: one tensor
        cut = catalogue.entries[name].cut
        tensors[name] = cut.cut_out(tensors[source], cut.whole, wanted[name])
    return {name: tensors[name] for name in wanted}


class _Reader:
    """Reads parts of parameters."""

    def __init__(self, model: OpenModel, names: list[str]) -> None:
        self._model = model
        self._names = names
        sources = {source for name in names for source in model.recipes[name].names}
        self._files: TensorFiles = open_files(model.model, wanted_names=sources)

    def __enter__(self) -> "_Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def prefetch(self, wanted: Mapping[str, Held]) -> None:
        """Lets a distant source bring everything at once."""
        self._files.prefetch([part.where for name in self._names for part in self._parts(name, wanted[name])])

    def read(self, name: str, held: Held) -> torch.Tensor:
        """The part of a parameter that has the units `held`."""
        entry = self._model.catalogue.entries[name]
        parts = self._parts(name, held)
        tensors = [self._files.read(*part.where) for part in parts]
        tensor = self._model.recipes[name].put_together(parts, tensors)
        expected = list(entry.shape)
        if entry.cut.segments:
            expected[entry.cut.dim] = entry.cut.size(held)
        if list(tensor.shape) != expected:
            raise ModelError(f"{self._model.model}: {name} should be {expected} in its files, found {list(tensor.shape)}")
        return tensor.to(entry.dtype)

    def _parts(self, name: str, held: Held) -> list[Part]:
        entry = self._model.catalogue.entries[name]
        cut = entry.cut
        if held == cut.whole:
            return self._model.recipes[name].parts(self._files, None, ())
        return self._model.recipes[name].parts(self._files, cut.dim, cut.spans(cut.whole, held))


def _same_tensor(model: OpenModel, name: str) -> str:
    """The parameter at the other end that has the same values and is held whole; empty if there is none."""
    source = model.catalogue.entries[name].tied_to
    if source is None or model.catalogue.entries[source].cut.segments or model.recipes[name] != model.recipes[source]:
        return ""
    return source


def _config(model: str, files: TensorFiles) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(files.config_folder)
    except BUILD_ERRORS as error:
        raise ModelError(f"{model}: cannot be loaded: {error}") from error
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else type(quantization).__name__
        raise ModelError(f"{model}: its weights are quantised ({method}); this engine reads plain ones")
    return config


def _recipe(name: str, found: Mapping[str, Recipe], catalogue: Catalogue, model: str) -> Recipe:
    """The recipe of a parameter, or of the one that it is tied to, whichever the files have."""
    entry = catalogue.entries[name]
    others = [other.name for other in catalogue.entries.values() if other.tied_to == name]
    for source in (name, entry.tied_to, *others):
        if source is not None and source in found:
            return found[source]
    raise ModelError(f"{model}: cannot be loaded: its files have no {name}")


def _end_token_ids(files: TensorFiles, config: PreTrainedConfig) -> tuple[int, ...]:
    """The generation configuration's word, else the model configuration's; either may name one id or several."""
    path = files.config_folder / "generation_config.json"
    ids = None
    if path.is_file():
        try:
            ids = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError) as error:
            raise ModelError(f"{path}: is no generation configuration: {error}") from error
    ids = config.get_text_config().eos_token_id if ids is None else ids
    return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)
