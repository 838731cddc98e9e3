"""Parts of parameters out of tensors that are kept apart in files, against conversion of the whole."""

from collections.abc import Mapping, Sequence
from math import prod

import torch
from hypothesis import given
from hypothesis import strategies as st
from stage_scene import tiny_config

from spotserve.engine.files.tensor_files import TensorPart
from spotserve.engine.recipes import Recipe, make_recipes
from spotserve.engine.skeleton import build_skeleton


class Tensors:
    """`TensorFiles` in memory, as far as a recipe goes."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, part: TensorPart) -> torch.Tensor:
        tensor = self._tensors[part.name]
        if part.dim is None or not part.spans:
            return tensor
        return torch.cat([tensor.narrow(part.dim, span.start, len(span)) for span in part.spans], dim=part.dim)


def numbered(shape: Sequence[int], start: int = 0) -> torch.Tensor:
    return torch.arange(start, start + prod(shape)).view(*shape)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Recipe, dict[str, torch.Tensor], torch.Tensor]:
    """A recipe, the files' tensors, and the whole parameter as the library would make it."""
    kind = draw(st.sampled_from(("renamed", "stacked", "stacked and joined", "joined", "chunk")))
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    count = draw(st.integers(1, 3))
    if kind == "renamed":
        whole = numbered((rows, columns))
        return Recipe((("a",),)), {"a": whole}, whole
    if kind == "chunk":
        dim, number = draw(st.integers(0, 1)), draw(st.integers(0, count - 1))
        shape = [rows, columns]
        shape[dim] *= count
        file = numbered(shape)
        return Recipe((("a",),), dim=dim, chunk=(number, count)), {"a": file}, file.chunk(count, dim)[number]
    if kind == "joined":
        dim = draw(st.integers(0, 1))
        sizes = draw(st.lists(st.integers(1, 3), min_size=2, max_size=3))
        parts = {}
        for number, size in enumerate(sizes):
            shape = [rows, columns]
            shape[dim] = size
            parts[f"a{number}"] = numbered(shape, 100 * number)
        return Recipe(tuple((name,) for name in parts), dim=dim), parts, torch.cat([*parts.values()], dim=dim)
    groups = {
        pattern: {f"{pattern}{expert}": numbered((rows, columns), 100 * index + 1000 * expert) for expert in range(count)}
        for index, pattern in enumerate("ab" if kind == "stacked and joined" else "a")
    }
    stacks = [torch.stack([*group.values()]) for group in groups.values()]
    along = draw(st.integers(1, 2)) if len(stacks) > 1 else None
    recipe = Recipe(tuple(tuple(group) for group in groups.values()), stacked=True, dim=along)
    tensors = {name: tensor for group in groups.values() for name, tensor in group.items()}
    return recipe, tensors, stacks[0] if along is None else torch.cat(stacks, dim=along)


@given(cases(), st.data())
def test_any_part_of_a_parameter(case: tuple[Recipe, dict[str, torch.Tensor], torch.Tensor], data: st.DataObject) -> None:
    recipe, tensors, whole = case
    files = Tensors(tensors)
    dim = data.draw(st.one_of(st.none(), st.integers(0, whole.dim() - 1)))
    spans: list[range] = []
    expected = whole
    if dim is not None:
        chosen = data.draw(st.sets(st.integers(0, whole.shape[dim] - 1), min_size=1))
        for index in sorted(chosen):
            if spans and spans[-1].stop == index:
                spans[-1] = range(spans[-1].start, index + 1)
            else:
                spans.append(range(index, index + 1))
        expected = whole.index_select(dim, torch.tensor(sorted(chosen)))
    parts = recipe.parts(files, dim, spans)  # type: ignore[arg-type]
    read = [files.read(part.where) for part in parts]
    assert torch.equal(recipe.put_together(parts, read), expected)


def test_experts_are_found_in_their_order() -> None:
    """Ten and more of them, whose names do not sort like numbers."""
    module = build_skeleton(tiny_config("mixtral", intermediate_size=16, num_local_experts=12), torch.float32)
    prefix = "model.layers.1.block_sparse_moe.experts"
    names = [f"{prefix}.{expert}.{matrix}.weight" for matrix in ("w1", "w2", "w3") for expert in range(12)]
    recipes = make_recipes(module, names)
    assert recipes.keys() == {"model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"}
    recipe = recipes["model.layers.1.mlp.experts.gate_up_proj"]
    assert recipe == Recipe(
        tuple(tuple(f"{prefix}.{expert}.{matrix}.weight" for expert in range(12)) for matrix in ("w1", "w3")), stacked=True, dim=1
    )
