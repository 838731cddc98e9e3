"""From a model's name to its tensors: the one place that knows which form of a name means which source."""

import importlib
from collections.abc import Collection
from pathlib import Path

from spotserve.core.errors import ModelError
from spotserve.engine.files.cache_folder import CacheFolder, default_cache_path
from spotserve.engine.files.local_files import open_folder
from spotserve.engine.files.tensor_files import TensorFiles


def open_files(model: str, wanted_names: Collection[str] | None = None) -> TensorFiles:
    """The tensors of `model`: a folder, `s3://bucket/prefix`, or a hub id.

    Args:
        wanted_names: tensors that will be read; files that hold none of them need not be there, and are not fetched from the
            hub. None: any may be.

    Raises:
        ModelError: the model is not there, cannot be read, is damaged, or has no safetensors.
    """
    if model.startswith("s3://"):
        return _open_s3(model, wanted_names)
    if "://" in model:
        raise ModelError(f"{model.partition('://')[0]}://: expected a folder, s3://BUCKET/PREFIX or a hub id")
    try:
        folder = Path(model).expanduser()
        if folder.exists():
            return open_folder(folder, wanted_names)
    except (OSError, RuntimeError) as error:  # the latter: no such user's home
        raise ModelError(f"{model}: cannot be read: {error}") from error
    if model.startswith(("/", "./", "../", "~")) or model.count("/") > 1:
        raise ModelError(f"{model}: there is no such folder")
    module = importlib.import_module("spotserve.engine.files.hub_files")
    files: TensorFiles = module.open_hub(model, wanted_names)
    return files


def _open_s3(url: str, wanted_names: Collection[str] | None) -> TensorFiles:
    try:
        module = importlib.import_module("spotserve.engine.files.s3_files")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("boto3", "botocore"):
            raise
        raise ModelError(f"{url}: needs the client of S3, which is not installed: pip install 'spotserve[s3]'") from error
    files: TensorFiles = module.open_s3(url, CacheFolder(default_cache_path()), wanted_names)
    return files
