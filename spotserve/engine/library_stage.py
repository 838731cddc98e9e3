"""A stage computed by the library's own modules.

`build_module` makes the model with everything outside a `StageSlice` replaced by modules without weights, and what is inside
cut down to one shard; scaled embeddings, learned positions, soft caps and whatever else a family does stay the library's code.
`LibraryStage` runs it and adds what shards do together. Serves every architecture that the catalogue accepts, and is the
measure of any faster stage.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from transformers.pytorch_utils import Conv1D

from spotserve.core.cut import units_held
from spotserve.core.errors import ModelError
from spotserve.engine.batch import StepRows
from spotserve.engine.catalogue import Catalogue, is_at_home
from spotserve.engine.cuts import Segment, StageSlice
from spotserve.engine.device import PROCESSOR
from spotserve.engine.linear import LEAST_ROWS, Map, Quantization, linear_map, row_sharded_map
from spotserve.engine.sharding import Division, local_count
from spotserve.engine.shards import Shards
from spotserve.engine.skeleton import LibraryModule, PassThrough, build_skeleton, move, stand_in


def build_module(catalogue: Catalogue, stage_slice: StageSlice, weights: Mapping[str, torch.Tensor]) -> LibraryModule:
    """The library's module of one rank, its weights those of `weights` (not copied).

    Args:
        catalogue: of the model.
        stage_slice: what the rank computes.
        weights: by name, everything that `catalogue.needed(stage_slice)` names, cut as it says.

    Raises:
        ModelError: the slice is not possible, or a weight is missing or has another shape than its part.
    """
    needed = catalogue.needed(stage_slice)
    module = build_skeleton(catalogue.config, catalogue.dtype)
    homes = catalogue.homes
    layers = module.get_submodule(homes.layers_path)
    for index, layer in enumerate(layers):
        if index in stage_slice.layers:
            _count_locally(layer, catalogue.divisions[index], stage_slice)
        else:
            layers[index] = PassThrough(layer, in_tuple=homes.layers_in_tuple)
    for path, home in homes.outside.items():
        if not is_at_home(home, stage_slice):
            owner = module.get_submodule(path)
            owner.forward = stand_in(owner)
    zeroed = _zeroed(catalogue, stage_slice)
    for name, held in needed.items():
        entry = catalogue.entries[name]
        expected = list(entry.shape)
        if entry.cut.segments:
            expected[entry.cut.dim] = entry.cut.size(held)
        tensor = weights.get(name)
        if tensor is None or list(tensor.shape) != expected or tensor.dtype != entry.dtype:
            found = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            raise ModelError(f"{catalogue.spec.name}: {name} should be {entry.dtype} {expected}, found {found}")
        _put(module, name, torch.zeros_like(tensor) if name in zeroed else tensor)
    return module


def _put(module: LibraryModule, name: str, tensor: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)
        if isinstance(owner, torch.nn.Linear) and leaf == "weight":
            owner.out_features, owner.in_features = tensor.shape
        elif hasattr(owner, "nf") and leaf == "weight":  # the library's Conv1D
            owner.nx, owner.nf = tensor.shape
    else:
        owner._buffers[leaf] = tensor


def _zeroed(catalogue: Catalogue, stage_slice: StageSlice) -> frozenset[str]:
    """Weights that only the first shard adds to a partial result."""
    if stage_slice.shard == 0:
        return frozenset()
    path = catalogue.homes.layers_path
    return frozenset(f"{path}.{index}.{name}" for index in stage_slice.layers for name in catalogue.divisions[index].first_only)


def _count_locally(layer: LibraryModule, division: Division, stage_slice: StageSlice) -> None:
    """Tells modules that count heads how many there are on this shard."""
    if stage_slice.tensor == 1:
        return
    for path, segment in division.counts.items():
        count = local_count(segment, stage_slice.tensor, stage_slice.shard)
        owner_path, _, name = path.rpartition(".")
        if owner_path == "config" or owner_path.endswith(".config"):
            owner = layer.get_submodule(owner_path.removesuffix("config").removesuffix("."))
            owner.config = copy.copy(owner.config)  # the other modules share the original
            setattr(owner.config, name, count)
        else:
            setattr(layer.get_submodule(owner_path), name, count)


class LibraryStage:
    """See `Stage`."""

    def __init__(
        self,
        catalogue: Catalogue,
        module: LibraryModule,
        stage_slice: StageSlice,
        shards: Shards,
        *,
        invariant: Literal["batch", "full"] = "batch",
        quantization: Quantization = "none",
        device: torch.device = PROCESSOR,
    ) -> None:
        """Takes over `module`, which `build_module` made of the same catalogue and slice.

        Args:
            catalogue: of the model.
            module: linear layers in it get their weights laid out anew (a second copy of them).
            stage_slice: what it computes.
            shards: those of the stage.
            invariant: what logits do not depend on, see `EngineSettings.invariant`.
            quantization: of the weights of linear layers.
            device: where to compute; the module goes there.

        Raises:
            ModelError: `full` is wanted and this model adds in a way that depends on the number of shards.
        """
        assert (shards.shard, shards.tensor) == (stage_slice.shard, stage_slice.tensor)
        if invariant == "full" and catalogue.unshardable is not None:
            raise ModelError(f"{catalogue.spec.name}: no arithmetic that is invariant over shards: {catalogue.unshardable}")
        move(module, device)
        self._module = module
        self._slice = stage_slice
        self._incoming: torch.Tensor | None = None
        self._outgoing: torch.Tensor | None = None
        layers = module.get_submodule(catalogue.homes.layers_path)
        for index in stage_slice.layers:
            _install(layers[index], catalogue.divisions[index], shards, invariant, quantization)
        if stage_slice.is_last and catalogue.head_path is not None:
            head = module.get_submodule(catalogue.head_path)
            head.forward = _by_rows(linear_map(head.weight, head.bias, quantization=quantization))
            if stage_slice.tensor > 1 and catalogue.entries[f"{catalogue.head_path}.weight"].cut.segments:
                head.register_forward_hook(lambda _, __, part: shards.gather(part))
        if not stage_slice.is_first:
            layers[stage_slice.layers.start].register_forward_pre_hook(self._substitute, with_kwargs=True)
        if not stage_slice.is_last:
            layers[stage_slice.layers.stop - 1].register_forward_hook(self._keep)

    def __call__(self, rows: StepRows, hidden: torch.Tensor | None, logit_rows: torch.Tensor | None) -> torch.Tensor:
        """See `Stage`."""
        self._incoming = hidden
        wanted = 0 if logit_rows is None else logit_rows.shape[0]
        if logit_rows is None or not wanted:  # the library computes the head in any case
            logit_rows = rows.positions.new_zeros(LEAST_ROWS)
        elif wanted < LEAST_ROWS:
            logit_rows = logit_rows.expand(LEAST_ROWS)
        output = self._module(
            input_ids=rows.token_ids[None],
            position_ids=rows.positions[None],
            logits_to_keep=logit_rows,
            use_cache=False,
            paged=rows.paged,
        )
        self._incoming, outgoing, self._outgoing = None, self._outgoing, None
        if not self._slice.is_last:
            assert outgoing is not None
            return outgoing[0]
        logits: torch.Tensor = output.logits[0, :wanted]
        return logits

    def _substitute(self, _: object, args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[object, object]:
        """Gives the first layer of this stage what came from the stage before."""
        assert self._incoming is not None, "a stage that is not the first starts from a hidden state"
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": self._incoming[None]}
        return (self._incoming[None], *args[1:]), kwargs

    def _keep(self, _: object, __: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        """Keeps what the last layer of this stage gave."""
        self._outgoing = output[0] if isinstance(output, tuple) else output


def _install(
    layer: LibraryModule,
    division: Division,
    shards: Shards,
    invariant: Literal["batch", "full"],
    quantization: Quantization,
) -> None:
    """Lays out the linear layers of a decoder layer, and lets its modules do together what shards do together."""
    for path, module in layer.named_modules():
        weight = _matrix(module)
        if weight is None:
            continue
        if path in division.sums:
            product = row_sharded_map(weight, module.bias, shards, invariant=invariant, quantization=quantization)
        else:
            product = linear_map(weight, module.bias, quantization=quantization)
        module.forward = _by_rows(product)
    for path in division.sums:
        module = layer.get_submodule(path)
        if _matrix(module) is not None:
            continue
        if invariant == "full":
            raise ModelError(f"{type(module).__name__}: no arithmetic that is invariant over shards")
        if shards.tensor > 1:
            module.register_forward_hook(lambda _, __, partial: shards.sum(partial))
    if shards.tensor > 1:
        for path, segment in division.norms.items():
            module = layer.get_submodule(path)
            module.forward = _norm_over_shards(module.forward, segment, shards)


def _matrix(module: LibraryModule) -> torch.Tensor | None:
    """[out, in] of a plain linear layer, in either of the library's layouts."""
    if type(module) is torch.nn.Linear:
        return module.weight
    return module.weight.T.contiguous() if type(module) is Conv1D else None


def _by_rows(product: Map) -> Map:
    """A product of [rows, in] for inputs with dimensions of any number."""

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        rows = product(hidden.reshape(-1, hidden.shape[-1]))
        return rows.view(*hidden.shape[:-1], rows.shape[-1])

    return forward


def _norm_over_shards(
    norm: Callable[[torch.Tensor], torch.Tensor], segment: Segment, shards: Shards
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The norm of all shards' columns, of which each goes on with its own: the same bits whatever the number of shards."""
    held = units_held(segment.num_units, shards.tensor, shards.shard)
    copies = max(1, shards.tensor // segment.num_units)
    start, length = held.start * segment.unit_size, len(held) * segment.unit_size

    def forward(part: torch.Tensor) -> torch.Tensor:
        parts = shards.gather(part)
        if copies > 1:  # units held by several shards came several times
            parts = parts.unflatten(-1, (shards.tensor, -1))[..., ::copies, :].flatten(-2)
        return norm(parts).narrow(-1, start, length)

    return forward
