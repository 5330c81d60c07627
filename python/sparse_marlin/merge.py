"""Linears that read the same input become one multiplication: q, k and v, or gate and up, of a transformer's layer.

With few tokens a multiplication costs a launch and a start, whatever its size, and small ones do not fill a GPU. Packed
weights lie row tile by row tile, so merging them is a concatenation. The layers stay where they are and keep their
names: the first one that runs multiplies for all, the others take their columns of that result.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ._extension import _core
from ._watch import check_module, watch
from .linear import SparseMarlinLinear, multiply

__all__ = ["MergedPart", "MergedWeight", "merge_linears", "unmerge_linears"]


def merge_linears(model: nn.Module, run: Callable[[], object]) -> list[tuple[str, ...]]:
    """Multiply SparseMarlinLinear layers that read the same input at once, in place: q, k, v; gate, up.

    `run` is called and must run the model as it will be used, e.g. `lambda: model(tokens)`. From that is taken which
    layers belong together: those that run one after the other on the same tensor, every time. They need equal
    `group_size`, `num_bits`, dtype and device, all a bias or none, no low-rank correction or one with the same
    `correction_down` (as `compress` makes them with `shared_correction`), and `out_features` that are multiples of 64
    (the last one's may be any). Other layers are left as they are, and so are those whose `forward` others have
    wrapped, as accelerate does in a model over several devices. At the end `run` is called once more; if something in
    the model does not take the merged layers' outputs, which are columns of one tensor, it fails there, and all is
    undone.

    The layers keep their names, attributes and part of `state_dict`; their weights are views of the merged one. A layer
    that runs alone costs as much as its group. Results are those of one layer with all outputs, which the kernels may
    sum up in another order; for gradients, too, the group is one operation, with one backward pass. Call it when the
    weights are loaded, before `enable_prefetch`, `torch.compile` and `torch.export`. `unmerge_linears` undoes it;
    `torch.jit.script` does so, too.

    Returns:
        The names of the layers of every group made, in the order in which they run; empty where there are none.

    Raises:
        TypeError: `model` is no module.
        ValueError: `run` ran no SparseMarlinLinear of `model`.
        Whatever `run` raises. The layers are then as they were.
    """
    check_module("merge_linears", model)
    groups = _groups(model, run)
    merged: list[list[SparseMarlinLinear]] = []
    try:
        for group in groups:
            _merge(group)
            merged.append(group)
        if merged:
            with torch.no_grad():
                run()
    except BaseException:
        for group in merged:
            _unmerge(group)
        raise
    names = {module: name for name, module in model.named_modules()}
    return [tuple(names[layer] for layer in group) for group in groups]


def unmerge_linears(model: nn.Module) -> None:
    """Undo `merge_linears`: every layer has a weight of its own again.

    Raises:
        TypeError: `model` is no module.
    """
    check_module("unmerge_linears", model)
    for layer in list(model.modules()):
        if isinstance(layer, MergedPart):
            _unmerge([layer])
        elif isinstance(layer, SparseMarlinLinear) and any(isinstance(f, MergedWeight) for f in layer._following):
            layer._following = ()  # would keep the merged weight in memory


# torch.cuda.current_stream makes an object of it, which takes as long as all else here.
_stream_of = getattr(torch._C, "_cuda_getCurrentRawStream", None) or torch.cuda.current_stream


class Kept:
    """A product whose columns were not all taken: its input, the product, what must not have changed when the next
    columns are taken, and which part these are. One tuple, so that threads see all of it or none."""

    product: tuple[torch.Tensor, torch.Tensor, object, int] | None = None


class MergedWeight(nn.Module):
    """The weights, scales and biases of several layers, one below the other. A submodule of every one of them; its
    tensors are in their state_dicts, not in its own."""

    weight_packed: torch.Tensor
    scales: torch.Tensor
    correction_up: torch.Tensor | None
    correction_scales: torch.Tensor | None
    correction_down: torch.Tensor | None

    def __init__(self, layers: list[SparseMarlinLinear]) -> None:
        super().__init__()
        first = layers[0]
        self.in_features, self.group_size, self.num_bits = first.in_features, first.group_size, first.num_bits
        self.rank = first.rank
        self.lengths = tuple(layer.out_features for layer in layers)
        self.starts = tuple(itertools.accumulate(self.lengths[:-1], initial=0))
        self._following: tuple[nn.Module, ...] = ()  # as in SparseMarlinLinear
        self._kept = Kept()
        self.register_buffer("weight_packed", torch.cat([layer.weight_packed for layer in layers]), persistent=False)
        self.register_buffer("scales", torch.cat([layer.scales for layer in layers], dim=1), persistent=False)
        ups = [layer.correction_up for layer in layers if layer.correction_up is not None]
        self.register_buffer("correction_up", torch.cat(ups) if ups else None, persistent=False)
        up_scales = [layer.correction_scales for layer in layers if layer.correction_scales is not None]
        self.register_buffer("correction_scales", torch.cat(up_scales, dim=1) if up_scales else None, persistent=False)
        self.register_buffer("correction_down", first.correction_down, persistent=False)
        biases = [layer.bias for layer in layers if layer.bias is not None]
        if biases:
            self.bias = nn.Parameter(torch.cat([b.detach() for b in biases]), requires_grad=biases[0].requires_grad)
        else:
            self.register_parameter("bias", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """All layers' outputs, side by side."""
        return multiply(self, x)

    def part_of_product(self, part: int, x: torch.Tensor) -> torch.Tensor:
        """The outputs of layer `part`. The product is computed for the first layer and kept until the last one, which
        must ask in turn, for the same tensor; who does otherwise gets a product of its own."""
        product, self._kept.product = self._kept.product, None  # nothing stays behind, whatever is raised
        state = self._state(x)
        if product is None or product[0] is not x or product[2:] != (state, part):
            product = (x, self(x), state, part)
        if part + 1 < len(self.lengths):
            self._kept.product = (x, product[1], state, part + 1)
        return product[1].narrow(-1, self.starts[part], self.lengths[part])

    def _state(self, x: torch.Tensor) -> object:
        """What a product depends on besides x's identity: changes in place, as far as tensors count them, autograd,
        autocast, and the stream that must have computed it. A compiled graph follows these by itself."""
        if torch.compiler.is_compiling():
            return None
        tensors = (x, *self._buffers.values(), *self._parameters.values())
        counts = [None if t is None or t.is_inference() else t._version for t in tensors]
        kind, stream = ("cuda", _stream_of(x.get_device())) if x.is_cuda else ("cpu", None)
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return counts, stream, autocast, torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_following": (), "_kept": Kept()}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        pass  # the parts do

    def _load_from_state_dict(self, *args: Any) -> None:
        pass

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={sum(self.lengths)}, of {len(self.lengths)} layers"


_BUFFERS = ("weight_packed", "scales", "correction_up", "correction_scales", "correction_down")
_TENSORS = ("bias", *_BUFFERS)  # in the order of a state_dict


class MergedPart(SparseMarlinLinear):
    """A layer whose weight is rows of a merged one. `merge_linears` makes a SparseMarlinLinear into one, in place."""

    merged: MergedWeight
    _part: int

    @property
    def weight_packed(self) -> torch.Tensor:  # type: ignore[override]
        return self._row_tiles(self.merged.weight_packed)

    def _row_tiles(self, packed: torch.Tensor) -> torch.Tensor:
        start = self.merged.starts[self._part] // _core.TILE_ROWS
        rows, _ = _core.packed_shape(self.out_features, self.in_features, self.num_bits)
        return packed[start : start + rows]

    @property
    def scales(self) -> torch.Tensor:  # type: ignore[override]
        return self.merged.scales.narrow(1, self.merged.starts[self._part], self.out_features)

    @property
    def correction_up(self) -> torch.Tensor | None:  # type: ignore[override]
        whole = self.merged.correction_up
        if whole is None:
            return None
        if self.packed_correction:
            return self._row_tiles(whole)
        return whole.narrow(0, self.merged.starts[self._part], self.out_features)

    @property
    def correction_scales(self) -> torch.Tensor | None:  # type: ignore[override]
        whole = self.merged.correction_scales
        return None if whole is None else whole.narrow(1, self.merged.starts[self._part], self.out_features)

    @property
    def correction_down(self) -> torch.Tensor | None:  # type: ignore[override]
        return self.merged.correction_down

    @property
    def bias(self) -> torch.Tensor | None:  # type: ignore[override]
        whole = self.merged.bias
        return None if whole is None else whole.narrow(0, self.merged.starts[self._part], self.out_features)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        return self.merged.part_of_product(self._part, x)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _TENSORS:
            raise AttributeError(
                f"SparseMarlinLinear: {name}: expected no other tensor for a layer that is merged with others; copy "
                "into this one with copy_(), or call unmerge_linears(model) first"
            )
        super().__setattr__(name, value)

    def _tensors(self) -> dict[str, torch.Tensor]:
        found = {name: getattr(self, name) for name in _TENSORS}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, tensor in self._tensors().items():  # columns of scales have gaps, which files do not take
            destination[prefix + name] = tensor.detach().contiguous()

    def _load_tensors(
        self, state_dict: dict[str, Any], prefix: str, _: Any, strict: bool, missing: list[str], unexpected: list[str],
        *others: Any,
    ) -> None:  # fmt: skip
        mine = self._tensors()
        with torch.no_grad():
            for name, tensor in mine.items():
                if prefix + name in state_dict:
                    tensor.copy_(state_dict[prefix + name])
                elif strict:
                    missing.append(prefix + name)
        if strict:
            here = {key for key in state_dict if key.startswith(prefix)}
            unexpected += sorted(here - {prefix + name for name in mine})

    def _loading_problem(self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> str | None:
        problem = super()._loading_problem(state_dict, prefix, local_metadata)
        mine, given = self.correction_down, state_dict.get(prefix + "correction_down")
        if problem is None and mine is not None and given is not None and not torch.equal(mine, given.to(mine)):
            return (
                "correction_down: expected the one that the merged layers share, got another; "
                "call unmerge_linears(model) first"
            )
        return problem

    def _alone(self) -> SparseMarlinLinear:
        """A layer of the same weight, in the same memory where that has no gaps."""
        layer = SparseMarlinLinear(
            self.in_features, self.out_features, bias=False, group_size=self.group_size, num_bits=self.num_bits,
            rank=self.rank, packed_correction=self.packed_correction, device="meta", dtype=self.scales.dtype,
        )  # fmt: skip
        for name in _BUFFERS:
            if getattr(self, name) is not None:
                setattr(layer, name, getattr(self, name).detach().contiguous())
        if self.bias is not None and self.merged.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach(), requires_grad=self.merged.bias.requires_grad)
        return layer.train(self.training)

    def __prepare_scriptable__(self) -> SparseMarlinLinear:
        return self._alone()  # TorchScript knows no layers that share a product

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, part {self._part + 1} of {len(self.merged.lengths)}"


def _groups(model: nn.Module, run: Callable[[], object]) -> list[list[SparseMarlinLinear]]:
    """Layers that always run one after the other on the same input, in their order."""
    layers = [module for module in model.modules() if isinstance(module, SparseMarlinLinear)]
    runs: list[list[SparseMarlinLinear]] = []  # one after the other on one input
    last: tuple[torch.Tensor, torch.Tensor] | None = None  # the last run's input, and its values when it began

    def note(layer: SparseMarlinLinear, args: tuple[Any, ...]) -> None:
        nonlocal last
        x = args[0] if args else None  # None: by name
        if last is not None and x is last[0] and _equal(x, last[1]) and _fit(runs[-1], layer):
            runs[-1].append(layer)
        else:
            runs.append([layer])
            last = None if x is None else (x, x.detach().clone())

    watch("merge_linears", layers, note, run)
    found: dict[SparseMarlinLinear, set[tuple[SparseMarlinLinear, ...]]] = {}
    for group in runs:
        for layer in group:
            found.setdefault(layer, set()).add(tuple(group))
    always = dict.fromkeys(tuple(group) for group in runs if all(len(found[layer]) == 1 for layer in group))
    return [list(group) for group in always if len(group) > 1]


def _equal(x: torch.Tensor, before: torch.Tensor) -> bool:
    """The same values: who changes the input in place between two layers means two inputs. NaN equals NaN."""
    return torch.equal(x.detach().nan_to_num(), before.nan_to_num())


def _fit(group: list[SparseMarlinLinear], layer: SparseMarlinLinear) -> bool:
    """Whether a layer's weight can lie below those of a group."""
    first = group[0]

    def settings(one: SparseMarlinLinear) -> tuple[object, ...]:
        return (
            type(one), "forward" in vars(one), one.in_features, one.group_size, one.num_bits, one.rank,
            one.packed_correction,
            one.scales.dtype, one.scales.device, one.bias is None, one.bias is not None and one.bias.requires_grad,
        )  # fmt: skip

    plain = type(first) is SparseMarlinLinear
    wrapped = "forward" in vars(first)  # by others, who may bring its weights from elsewhere
    aligned = group[-1].out_features % _core.TILE_ROWS == 0
    if not plain or wrapped or not aligned or layer in group or settings(layer) != settings(first):
        return False
    down, other = first.correction_down, layer.correction_down
    return down is None or other is None or torch.equal(down, other)


def _merge(layers: list[SparseMarlinLinear]) -> None:
    merged = MergedWeight(layers)
    for part, layer in enumerate(layers):
        for name in _BUFFERS:
            del layer._buffers[name]
        del layer._parameters["bias"]
        layer.__class__ = MergedPart
        layer.register_module("merged", merged)
        layer._following = ()  # enable_prefetch gives the merged weight one
        layer._part = part  # type: ignore[assignment]


def _unmerge(layers: list[Any]) -> None:
    for layer in layers:
        alone = layer._alone()
        del layer._modules["merged"], layer._part
        layer.__class__ = SparseMarlinLinear
        layer._buffers |= {name: None if tensor is None else tensor.clone() for name, tensor in alone._buffers.items()}
        layer._parameters["bias"] = (
            alone.bias
            if alone.bias is None
            else nn.Parameter(alone.bias.detach().clone(), requires_grad=alone.bias.requires_grad)
        )
