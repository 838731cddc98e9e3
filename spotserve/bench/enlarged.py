"""A small Llama embedded in a larger shape: it computes the same function and costs what the larger shape costs.

    python -m spotserve.bench.enlarged --source spotserve/demo/models/target --size 7B --dtype bfloat16 --out /dev/shm/target-7B

What speculative decoding is worth depends on two things at once: how much more a step of the target costs than one of the draft,
and how often the target says what the draft guessed. Random weights of a large shape have the cost and no text; the models that
ship have text and no cost. An enlarged model has both: its answers are those of the small one, which the small draft can guess.

How it is done, with n the small hidden size, and c * 4^k the factor by which the hidden size grows:

- The residual stream is (x, .., x, 0, .., 0): c copies of the small one, then zeros. Its mean square is that of x over 4^k, so
  norms get the weights w / 2^k and epsilon / 4^k and give exactly what the small ones give; 2^k is exact in every dtype.
- Whatever reads the stream has the small weights where the first copy is and zeros where the others are; whatever writes to it
  writes every copy. The last norm lets the first copy through alone, so a head that is tied to the embedding stays right.
- Heads, inputs of the MLP and layers are added behind the small ones, with random weights of ordinary size; what they compute is
  multiplied by zeros in `o_proj` and `down_proj`. The size of a head and the number of query heads to a key-value head stay, as the
  rotary frequencies and the order of heads depend on them; the vocabulary stays.

Up to the order of sums the function is the same one. What this does not show: text of the quality that a model of this size
writes, and therefore how often a real draft is right about a real target; the cost of a large vocabulary; heads of 64 or 128
elements (there are more and smaller ones here). Nor do multiplications by zeros heat a chip as others do: where a product is
bound by power it may run a little faster than with real weights.
"""

import argparse
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file

from spotserve.core.errors import ModelError
from spotserve.engine.dtypes import DTYPES

Dtype = Literal["float32", "bfloat16", "float16", "float64"]
_COPIED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
_FILE_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""As safetensors names them."""
_POOL_VALUES = 1_000_003
"""A prime, so that the rows of a matrix that is filled from the pool differ."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What an enlarged model is as large as."""

    hidden_size: int
    layers: int
    intermediate_size: int

    def num_parameters(self, *, vocabulary_size: int, queries_per_kv_head: int) -> int:
        """With heads as wide as the hidden size, and the head tied to the embedding."""
        attention = self.hidden_size**2 * (2 + 2 / queries_per_kv_head)
        norms = 2 * self.hidden_size
        layer = attention + norms + 3 * self.hidden_size * self.intermediate_size
        return round(self.layers * layer) + self.hidden_size * (vocabulary_size + 1)


SHAPES: Mapping[str, Shape] = {
    "30M": Shape(512, 8, 1792),
    "100M": Shape(768, 12, 3072),
    "300M": Shape(1024, 24, 3072),
    "1B": Shape(2048, 16, 8192),
    "3B": Shape(3072, 28, 8192),
    "7B": Shape(4096, 32, 14336),
}
"""By the number of parameters that they have with the vocabulary of the models that ship. The last three are the shapes of
Llama-3.2-1B, Llama-3.2-3B and Mistral-7B; both models that ship fit into all of them."""


def enlarge_to(size: str, source: Path, out: Path, *, dtype: Dtype) -> None:
    """`enlarge` to one of `SHAPES`.

    Raises:
        ModelError: there is no such size, or as `enlarge`.
    """
    if size not in SHAPES:
        raise ModelError(f"no shape of size {size}: there are {', '.join(SHAPES)}")
    shape, small = SHAPES[size], _Small.read(source)
    enlarge(
        source,
        out,
        hidden_size=shape.hidden_size,
        layers=shape.layers,
        intermediate_size=shape.intermediate_size,
        heads=shape.hidden_size // small.head_size,
        dtype=dtype,
    )


def enlarge(source: Path, out: Path, *, hidden_size: int, layers: int, intermediate_size: int, heads: int, dtype: Dtype) -> None:
    """Writes the enlarged model to the folder `out`, tensor by tensor: the whole of it is never in memory.

    Args:
        source: folder of a Llama without biases, in safetensors.
        out: folder, made if it is missing.
        hidden_size: a multiple of the small one.
        layers: at least as many as the small one has, like the next two.
        intermediate_size: width of the MLP.
        heads: query heads, of the small one's size; there are as many of them to a key-value head as in the small one. The library
            wants the hidden size to be a multiple of their number.
        dtype: of the weights.

    Raises:
        ModelError: `source` is no such model, or does not fit into the shape.
    """
    small = _Small.read(source)
    large = _Large(small, hidden_size, layers, intermediate_size, heads, DTYPES[dtype])
    out.mkdir(parents=True, exist_ok=True)
    config = {key: value for key, value in small.config.items() if key != "torch_dtype"}
    config |= {
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "intermediate_size": intermediate_size,
        "num_attention_heads": heads,
        "num_key_value_heads": large.kv_heads,
        "head_dim": small.head_size,
        "rms_norm_eps": small.config["rms_norm_eps"] * large.norm_scale**2,
        "dtype": dtype,
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in _COPIED_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    _write(out / "model.safetensors", large)


@dataclass(frozen=True, slots=True)
class _Small:
    """The model that is enlarged."""

    config: Mapping[str, Any]
    weights: Mapping[str, torch.Tensor]

    @classmethod
    def read(cls, folder: Path) -> "_Small":
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            weights: dict[str, torch.Tensor] = {}
            for path in sorted(folder.glob("*.safetensors")):
                weights |= load_file(path)
        except (OSError, ValueError) as error:
            raise ModelError(f"{folder}: cannot be read: {error}") from error
        if config.get("model_type") != "llama" or config.get("attention_bias") or config.get("mlp_bias") or not weights:
            raise ModelError(f"{folder}: is no Llama without biases, which is all that can be enlarged")
        return cls(config, weights)

    @property
    def hidden_size(self) -> int:
        return int(self.config["hidden_size"])

    @property
    def layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def heads(self) -> int:
        return int(self.config["num_attention_heads"])

    @property
    def kv_heads(self) -> int:
        return int(self.config.get("num_key_value_heads") or self.heads)

    @property
    def head_size(self) -> int:
        return int(self.config.get("head_dim") or self.hidden_size // self.heads)


class _Large:
    """Names, shapes and values of the enlarged model's tensors."""

    def __init__(
        self, small: _Small, hidden_size: int, layers: int, intermediate_size: int, heads: int, dtype: torch.dtype
    ) -> None:
        queries = small.heads // small.kv_heads
        factor, left = divmod(hidden_size, small.hidden_size)
        if left or not factor or heads % queries or hidden_size % heads:
            raise ModelError(
                f"a hidden size must be a multiple of {small.hidden_size} and of the number of heads, "
                f"heads a multiple of {queries}: not {hidden_size} and {heads}"
            )
        given = {"layers": layers, "intermediate_size": intermediate_size, "heads": heads}
        least = {"layers": small.layers, "intermediate_size": int(small.config["intermediate_size"]), "heads": small.heads}
        for name, value in given.items():
            if value < least[name]:
                raise ModelError(f"an enlarged model has {name} of {least[name]} at least, not {value}")
        self.dtype, self.kv_heads = dtype, heads // queries
        self.norm_scale = 1.0
        """What norm weights are multiplied by: 2^-k."""
        while factor % 4 == 0:
            factor, self.norm_scale = factor // 4, self.norm_scale / 2
        self._copies = factor
        self._small, self._hidden, self._layers, self._inside = small, hidden_size, layers, intermediate_size
        self._query_rows, self._kv_rows = heads * small.head_size, self.kv_heads * small.head_size
        generator = torch.Generator().manual_seed(0)
        magnitudes = torch.rand(_POOL_VALUES, generator=generator).add_(0.5)  # none so small that its products are denormal
        self._pool = magnitudes * torch.randint(0, 2, (_POOL_VALUES,), generator=generator).mul_(2).sub_(1)

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Of all tensors, in the order of the file."""
        vocabulary = int(self._small.config["vocab_size"])
        yield "model.embed_tokens.weight", (vocabulary, self._hidden)
        for layer in range(self._layers):
            yield f"model.layers.{layer}.input_layernorm.weight", (self._hidden,)
            yield f"model.layers.{layer}.self_attn.q_proj.weight", (self._query_rows, self._hidden)
            yield f"model.layers.{layer}.self_attn.k_proj.weight", (self._kv_rows, self._hidden)
            yield f"model.layers.{layer}.self_attn.v_proj.weight", (self._kv_rows, self._hidden)
            yield f"model.layers.{layer}.self_attn.o_proj.weight", (self._hidden, self._query_rows)
            yield f"model.layers.{layer}.post_attention_layernorm.weight", (self._hidden,)
            yield f"model.layers.{layer}.mlp.gate_proj.weight", (self._inside, self._hidden)
            yield f"model.layers.{layer}.mlp.up_proj.weight", (self._inside, self._hidden)
            yield f"model.layers.{layer}.mlp.down_proj.weight", (self._hidden, self._inside)
        yield "model.norm.weight", (self._hidden,)
        if "lm_head.weight" in self._small.weights:
            yield "lm_head.weight", (vocabulary, self._hidden)

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The values of one."""
        small = self._small.weights.get(name)  # None: of an added layer
        width, copies = self._small.hidden_size, self._copies
        kind = name.split(".")[-2]
        if kind in ("o_proj", "down_proj"):
            value = torch.zeros(shape, dtype=self.dtype)
            if small is not None:
                for copy in range(copies):
                    value[copy * width : (copy + 1) * width, : small.shape[1]] = small
        elif kind == "embed_tokens":
            assert small is not None
            value = torch.zeros(shape, dtype=self.dtype)
            value[:, : copies * width] = small.repeat(1, copies)
        elif len(shape) == 1:
            value = self._ordinary(shape, self.norm_scale).abs_()
            if small is not None:
                value[: copies * width] = (small.double() * self.norm_scale).repeat(copies)
            if kind == "norm":
                value[width : copies * width] = 0
        else:
            value = self._ordinary(shape, self._hidden**-0.5)
            if small is not None:
                value[: small.shape[0], :width] = small
                value[: small.shape[0], width : copies * width] = 0
        return value

    def _ordinary(self, shape: tuple[int, ...], size: float) -> torch.Tensor:
        """Random values about as large as `size`: from a pool, as drawing billions would take minutes."""
        count = math.prod(shape)
        pool = (self._pool * size).to(self.dtype)
        return pool.repeat(-(-count // _POOL_VALUES))[:count].view(shape)


def _write(path: Path, large: _Large) -> None:
    """A safetensors file: the length of the header, the header, the tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in large.shapes():
        end = at + math.prod(shape) * large.dtype.itemsize
        header[name] = {"dtype": _FILE_DTYPES[large.dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name, shape in large.shapes():
            file.write(large.tensor(name, shape).flatten().view(torch.uint8).numpy().data)


def main(arguments: Sequence[str] | None = None) -> None:
    """Enlarges one model."""
    parser = argparse.ArgumentParser(prog="python -m spotserve.bench.enlarged", description="A small Llama in a larger shape")
    parser.add_argument("--source", type=Path, required=True, help="folder of the small model")
    parser.add_argument("--size", choices=tuple(SHAPES), required=True, help="parameters")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16", help="of the weights")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parsed = parser.parse_args(arguments)
    try:
        enlarge_to(parsed.size, parsed.source, parsed.out, dtype=parsed.dtype)
    except ModelError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
