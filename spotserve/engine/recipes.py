"""Which tensors of a model's files make up a parameter of the library's module.

Files often have other names than the module, and some families keep in many tensors what the module keeps in one (each expert's
matrices, for one). The library knows how (`transformers.conversion_mapping`), but it converts whole tensors while it loads
them; here the same knowledge becomes a `Recipe`, from which any part of a parameter can be read without the rest.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from spotserve.core.errors import ModelError
from spotserve.engine.cuts import overlap
from spotserve.engine.files.tensor_files import TensorFiles, TensorPart
from spotserve.engine.skeleton import LibraryModule


@dataclass(frozen=True, slots=True)
class Recipe:
    """How tensors of files become one parameter."""

    sources: tuple[tuple[str, ...], ...]
    """Names in the files, side by side along `dim`; each is a group of tensors that are stacked if `stacked`."""
    stacked: bool = False
    """Whether the parameter has a first dimension more than its tensors: one for each of a group."""
    dim: int | None = None
    """Of the parameter."""
    chunk: tuple[int, int] | None = None
    """Number and count of equal chunks along `dim`, if the parameter is only one of them."""

    @property
    def names(self) -> tuple[str, ...]:
        """All tensors that it takes."""
        return tuple(name for group in self.sources for name in group)

    def parts(self, files: TensorFiles, dim: int | None, spans: Sequence[range]) -> list["Part"]:
        """What has to be read for the `spans` of indices along dimension `dim` of the parameter; dim None: for all of it.

        Spans rise and do not overlap. The parts come in the order in which `put_together` wants them.
        """
        shift = 1 if self.stacked else 0
        parts = []
        start = 0  # of this source along `self.dim` of the parameter
        for column, group in enumerate(self.sources):
            first = start
            if self.dim is not None:
                length = files.shape(group[0])[self.dim - shift]
                if self.chunk is not None:
                    number, count = self.chunk
                    length //= count
                    first -= number * length
                start += length
            for row, name in enumerate(group):
                if dim is None or (dim == 0 and self.stacked):
                    here = dim is None or any(row in span for span in spans)
                    file_dim, file_spans = (None, []) if self.chunk is None else (self.dim, [range(-first, -first + length)])
                elif dim == self.dim:
                    inside = [overlap(span, range(start - length, start)) for span in spans]
                    file_spans = [range(span.start - first, span.stop - first) for span in inside if len(span)]
                    here, file_dim = bool(file_spans), dim - shift
                else:
                    here, file_dim, file_spans = True, dim - shift, list(spans)
                if here:
                    narrowed = None
                    if self.chunk is not None and file_dim != self.dim:
                        narrowed = range(-first, -first + length)
                    parts.append(Part(TensorPart(name, file_dim, tuple(file_spans or ())), row, column, narrowed))
        return parts

    def put_together(self, parts: Sequence["Part"], tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The parameter, or the part of it that `parts` read."""
        columns: dict[int, list[torch.Tensor]] = {}
        for part, tensor in zip(parts, tensors, strict=True):
            if part.narrowed is not None and self.dim is not None:
                tensor = tensor.narrow(self.dim, part.narrowed.start, len(part.narrowed))
            columns.setdefault(part.column, []).append(tensor)
        groups = [torch.stack(group) if self.stacked else group[0] for group in columns.values()]
        return groups[0] if len(groups) == 1 else torch.cat(groups, dim=self.dim or 0)


@dataclass(frozen=True, slots=True)
class Part:
    """One read from the files."""

    where: TensorPart
    row: int
    """In its group."""
    column: int
    """Which group."""
    narrowed: range | None
    """What to take along `Recipe.dim` of what was read."""


@dataclass(slots=True)
class _Found:
    """Tensors of one parameter, by the pattern that found them."""

    converter: WeightConverter | None
    by_pattern: dict[str, list[str]] = field(default_factory=dict)


def make_recipes(module: LibraryModule, file_names: Collection[str]) -> dict[str, Recipe]:
    """A recipe for each parameter that the files have.

    Args:
        module: a skeleton of the model.
        file_names: of all tensors in its files.

    Raises:
        ModelError: the library converts its files in a way that cannot be read in parts.
    """
    transforms = get_model_conversion_mapping(module)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    wanted = module.state_dict()
    prefix = module.base_model_prefix
    found: dict[str, _Found] = {}
    for name in sorted(file_names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
        if target not in wanted and name in wanted:
            target, pattern = rename_source_key(name, [], [], prefix, wanted)
        if target in wanted:
            converter = by_pattern[pattern] if pattern is not None else None
            into = found.setdefault(target, _Found(converter))
            into.by_pattern.setdefault(pattern or name, []).append(name)
    recipes: dict[str, Recipe] = {}
    for target, entry in found.items():
        recipes.update(_recipes_of(target, entry))
    return recipes


def _recipes_of(target: str, found: _Found) -> Mapping[str, Recipe]:
    converter = found.converter
    if converter is None:
        return {target: Recipe((tuple(next(iter(found.by_pattern.values()))),))}
    groups = tuple(tuple(found.by_pattern[pattern]) for pattern in converter.source_patterns if pattern in found.by_pattern)
    match converter.operations:
        case [MergeModulelist(dim=0)] if len(groups) == 1:
            return {target: Recipe(groups, stacked=True)}
        case [MergeModulelist(dim=0), Concatenate() as join] if join.dim > 0:
            return {target: Recipe(groups, stacked=True, dim=join.dim)}
        case [Concatenate() as join] if all(len(group) == 1 for group in groups):
            return {target: Recipe(groups, dim=join.dim)}
        case [Chunk() as split] if len(groups) == 1 and len(groups[0]) == 1:
            first, *_ = targets = converter.target_patterns
            return {
                target.replace(first, name): Recipe(groups, dim=split.dim, chunk=(number, len(targets)))
                for number, name in enumerate(targets)
            }
    operations = ", ".join(type(operation).__name__ for operation in converter.operations)
    raise ModelError(f"{target}: its files are converted by {operations}, which cannot be read in parts")
