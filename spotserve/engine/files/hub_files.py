"""Models by hub id: the hub's own cache and downloads, honouring HF_HUB_OFFLINE, HF_HOME and HF_TOKEN.

The hub's library locks and resumes its downloads, so ranks of one machine fetch a file once. It fetches whole files: a rank that
says which tensors it wants gets the shards of the index that hold them, not ranges.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

import httpx
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from spotserve.core.errors import ModelError
from spotserve.engine.files.local_files import open_folder
from spotserve.engine.files.model_index import CONFIG_PATTERNS, read_index
from spotserve.engine.files.tensor_files import TensorFiles


def open_hub(model: str, wanted_names: Collection[str] | None = None) -> TensorFiles:
    """The model with hub id `model`; of a sharded one only the files that hold `wanted_names` (None: all) are fetched.

    Raises:
        ModelError: there is no such model, it may not be read, has no safetensors, or cannot be reached and is not in the cache.
    """
    folder = _fetched(model, CONFIG_PATTERNS)
    present = {path.name for path in folder.iterdir()}
    if any(name.endswith(".safetensors.index.json") for name in present):
        index = read_index(present, lambda name: (folder / name).read_bytes(), model)
        _fetched(model, index.needed(wanted_names), revision=folder.name)
    else:
        _fetched(model, ("*.safetensors",), revision=folder.name)
    return open_folder(folder, wanted_names)


def _fetched(model: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    """The hub's snapshot folder, whose name is the commit; `revision` keeps a second call on the commit of the first."""
    try:
        return Path(snapshot_download(model, allow_patterns=list(patterns), revision=revision))
    except HFValidationError as error:
        raise ModelError(f"{model}: neither a folder nor a hub id: {error}") from error
    except GatedRepoError as error:
        raise ModelError(f"{model}: on the hub, behind terms that must be accepted there; set HF_TOKEN: {error}") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{model}: neither a folder here nor a model on the hub that may be read (HF_TOKEN names who asks)"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ModelError(
            f"{model}: no folder, and the hub's cache does not hold {', '.join(patterns)} of it, while the hub is out of reach or "
            "HF_HUB_OFFLINE is set"
        ) from error
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise ModelError(f"{model}: cannot be fetched from the hub: {error}") from error
