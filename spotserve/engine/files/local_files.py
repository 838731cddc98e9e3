"""Weights in a folder of this machine, in Hugging Face format: mapped, never copied as a whole.

As with any mapping, a file that is cut short while it is in use takes its readers down (SIGBUS): replace files by renaming.
"""

from collections.abc import Collection
from pathlib import Path

from spotserve.core.errors import ModelError
from spotserve.engine.files.mapped_file import MappedFile
from spotserve.engine.files.model_index import read_index
from spotserve.engine.files.opened_model import OpenedModel
from spotserve.engine.files.tensor_files import TensorFiles


def open_folder(folder: Path, wanted_names: Collection[str] | None = None) -> TensorFiles:
    """The model in `folder`. Only files that hold tensors of `wanted_names` (None: all) need to be there.

    Raises:
        ModelError: the folder or a file of it is missing, unreadable or damaged; it holds no safetensors.
    """
    try:
        present = {str(path.relative_to(folder)) for path in folder.iterdir()}
        if "config.json" not in present:
            raise ModelError(f"{folder}: no config.json; expected a model's folder in Hugging Face format")
        index = read_index(present, lambda name: (folder / name).read_bytes(), str(folder))
    except OSError as error:
        raise ModelError(f"{error.filename or folder}: cannot be read: {error.strerror or error}") from error
    present |= {file for file in index.files if "/" in file and (folder / file).is_file()}
    index.check_present(present, wanted_names)
    model = OpenedModel(folder, index, lambda name: MappedFile.open(folder / name), lambda: None)
    model.check(index.needed(wanted_names))
    return model
