"""What the planner needs to know of a model, read off its configuration: one JSON document on standard output.

    python -m spotserve.bench.describe FOLDER --dtype bfloat16

A process of its own, because the command line does not load torch. Weights are not needed, and not read.
"""

import argparse
import sys
from pathlib import Path

import msgspec
from transformers import AutoConfig

from spotserve.core.errors import ModelError
from spotserve.core.model import ModelSpec
from spotserve.engine.catalogue import make_catalogue
from spotserve.engine.dtypes import DTYPES
from spotserve.engine.skeleton import BUILD_ERRORS


def describe(model: str, dtype: str) -> ModelSpec:
    """The shape of the model in this folder or of this hub id.

    Raises:
        ModelError: there is none, or this engine cannot serve it; the message names the model and the reason.
    """
    try:
        config = AutoConfig.from_pretrained(model)
    except BUILD_ERRORS as error:
        raise ModelError(f"{model}: its configuration cannot be read: {error}") from error
    return make_catalogue(config, name=Path(model).name, dtype=DTYPES[dtype]).spec


def main() -> None:
    """Prints it; exit code 1 and one line when there is nothing to print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder in Hugging Face format, or a hub id")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16", help="of weights and KV cache")
    arguments = parser.parse_args()
    try:
        print(msgspec.json.encode(describe(arguments.model, arguments.dtype)).decode())
    except ModelError as error:
        sys.exit(str(error).partition("\n")[0])


if __name__ == "__main__":
    main()
