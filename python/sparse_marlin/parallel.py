"""Tensor parallelism over torch.distributed: column- and row-parallel layers, and transformers models cut to them.

    torch.distributed.init_process_group("nccl")          # torchrun --nproc-per-node 2 ...
    model, report = sparse_marlin.sharded_loading.from_pretrained(path)  # each rank reads its part
    report = sparse_marlin.parallel.tensor_parallel(model)  # or: cut a model that is there, the same on every rank

A column-parallel layer holds some output features: its input is whole, its output a part. A row-parallel layer holds
some input features: its input is a part, and the partial products are summed over the ranks, so only rank 0 has the
bias. An attention or feed-forward block is a column layer, what lies between, and a row layer: one sum each.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .linear import SparseMarlinLinear
from .low_rank import tail_columns
from .merge import MergedPart
from .model import default_device
from .ops import unpack_24_weights
from .quantize import QuantizedWeight
from .replace import module_bytes
from .shard_plan import Cut, Range, ShardPlan, linear_sizes, make_plan, split_layer
from .slicing import PackedLayer, owned, slice_in, slice_out

Group = Any  # torch.distributed.ProcessGroup, or None for all ranks


def rank_and_size(group: Group = None) -> tuple[int, int]:
    """This process in the group; (0, 1) where torch.distributed is not in use."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


@contextlib.contextmanager
def torchrun_group(device: torch.device | None = None) -> Iterator[torch.device | None]:
    """Inside, the processes that torchrun started are one group, over NCCL where they compute on GPUs and gloo on the
    CPU; yields this process's device. Without torchrun, or with one process, nothing happens.

    `device`: cuda, or None for the default, becomes the GPU of this process's LOCAL_RANK.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1 or not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        yield device
        return
    device = default_device() if device is None else device
    if device.type == "cuda":
        local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if device.index is not None or local >= count:
            raise ValueError(
                f"torchrun: device: expected cuda with one GPU for each process of this machine, got {device} and "
                f"{count} GPUs for local rank {local}; start fewer processes, or pass cpu"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    # Imported while a group exists, as torch._dynamo does, it would keep the group in the defaults of its functions:
    # gloo's threads would then live until the interpreter ends, which now and then ends with SIGABRT.
    importlib.import_module("torch.distributed.nn.functional")
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", device_id=device if device.type == "cuda" else None
    )
    try:
        yield device
    finally:
        dist.destroy_process_group()


# --- what the ranks say to each other ---------------------------------------------------------------------------------


class _SumForward(torch.autograd.Function):
    """The sum over the ranks; the gradient is already the same on each."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, group: Group) -> torch.Tensor:
        total = part.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class _SumBackward(torch.autograd.Function):
    """A whole input of layers that are parts: each rank's gradient is a part of the sum."""

    @staticmethod
    def forward(ctx: Any, whole: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Gather(torch.autograd.Function):
    """The last dimension's parts side by side, on every rank; the gradient is cut again."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, ranges: tuple[Range, ...], rank: int, group: Group) -> torch.Tensor:
        ctx.range = ranges[rank]
        return _gathered(part, ranges, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return grad[..., ctx.range[0] : ctx.range[1]], None, None, None


def _gathered(part: torch.Tensor, ranges: tuple[Range, ...], group: Group) -> torch.Tensor:
    widths = [stop - start for start, stop in ranges]
    flat = part.reshape(-1, part.shape[-1])
    if flat.shape[1] < max(widths):  # collectives want equal shares
        flat = nn.functional.pad(flat, (0, max(widths) - flat.shape[1]))
    everyone = flat.new_empty((len(ranges) * flat.shape[0], flat.shape[1]))
    dist.all_gather_into_tensor(everyone, flat.contiguous(), group=group)
    parts = everyone.unflatten(0, (len(ranges), flat.shape[0])).unbind(0)
    whole = torch.cat([each[:, :width] for each, width in zip(parts, widths, strict=True)], dim=1)
    return whole.reshape(*part.shape[:-1], whole.shape[1])


def _needs_grad(tensor: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and tensor.requires_grad


# --- layers -----------------------------------------------------------------------------------------------------------


class ColumnParallelLinear(nn.Module):
    """Some output features of a linear. The input is whole; the output is this rank's part, or, with `gather_output`,
    the whole on every rank.

    `linear` holds the part: a SparseMarlinLinear, or an nn.Linear where a layer stayed dense. `ranges` are the output
    features of every rank.
    """

    def __init__(
        self, linear: nn.Module, ranges: tuple[Range, ...], *, gather_output: bool = False, group: Group = None
    ) -> None:
        super().__init__()
        self.linear, self.ranges, self.gather_output, self.group = linear, ranges, gather_output, group
        self.rank, self.world_size = rank_and_size(group)
        self.in_features, self.out_features = linear_sizes(linear)[1], ranges[-1][1]
        _check_share(self, linear_sizes(linear)[0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.world_size > 1 and _needs_grad(x):
            x = _SumBackward.apply(x, self.group)
        out = self.linear(x)
        if not self.gather_output or self.world_size == 1:
            return out
        if _needs_grad(out):
            return _Gather.apply(out, self.ranges, self.rank, self.group)
        return _gathered(out, self.ranges, self.group)

    def extra_repr(self) -> str:
        return _share_text(self) + (", gather_output=True" if self.gather_output else "")


class RowParallelLinear(nn.Module):
    """Some input features of a linear; the ranks' products are summed. The input is this rank's part, or, with
    `split_input`, the whole, of which the layer takes its part.

    The products are rounded to the dtype of the activations before they are summed, as everywhere in this field. Only
    rank 0's `linear` may have a bias.
    """

    def __init__(
        self, linear: nn.Module, ranges: tuple[Range, ...], *, split_input: bool = False, group: Group = None
    ) -> None:
        super().__init__()
        self.linear, self.ranges, self.split_input, self.group = linear, ranges, split_input, group
        self.rank, self.world_size = rank_and_size(group)
        self.in_features, self.out_features = ranges[-1][1], linear_sizes(linear)[0]
        _check_share(self, linear_sizes(linear)[1])
        if self.rank > 0 and getattr(linear, "bias", None) is not None:
            raise ValueError(
                f"RowParallelLinear: linear.bias: expected None on rank {self.rank}, got one; the sum would have it "
                f"{self.world_size} times"
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.split_input:
            if self.world_size > 1 and _needs_grad(x):
                x = _SumBackward.apply(x, self.group)
            start, stop = self.ranges[self.rank]
            x = x[..., start:stop]
        out = self.linear(x)
        if self.world_size == 1:
            return out
        if _needs_grad(out):
            return _SumForward.apply(out, self.group)
        dist.all_reduce(out, group=self.group)
        return out

    def extra_repr(self) -> str:
        return _share_text(self) + (", split_input=True" if self.split_input else "")


def _check_share(layer: ColumnParallelLinear | RowParallelLinear, size: int) -> None:
    if len(layer.ranges) != layer.world_size:
        raise ValueError(
            f"{type(layer).__name__}: ranges: expected one for each of {layer.world_size} ranks, "
            f"got {len(layer.ranges)}"
        )
    start, stop = layer.ranges[layer.rank]
    if stop - start != size:
        raise ValueError(
            f"{type(layer).__name__}: linear: expected the {stop - start} features {start} to {stop} of rank "
            f"{layer.rank}, got {size}"
        )


def _share_text(layer: ColumnParallelLinear | RowParallelLinear) -> str:
    start, stop = layer.ranges[layer.rank]
    return (
        f"in_features={layer.in_features}, out_features={layer.out_features}, "
        f"rank {layer.rank} of {layer.world_size}: {start} to {stop}"
    )


def cut_linear(linear: nn.Module, column: bool, part: Range, *, bias: bool = True, name: str = "linear") -> nn.Module:
    """The layer with output features (`column`) or input features `part` alone, in memory of its own. `bias=False`
    leaves the bias out (row-parallel on ranks other than 0)."""
    start, stop = part
    old: Any = linear.bias if bias else None
    kept = None if old is None else (old.detach()[start:stop] if column else old.detach()).clone()
    made: nn.Module
    if isinstance(linear, SparseMarlinLinear):
        whole = PackedLayer.of(linear, name)
        made = owned(slice_out(whole, start, stop) if column else slice_in(whole, start, stop)).to_linear(kept)
        _cut_correction(linear, made, column, part, name)
    elif isinstance(linear, nn.Linear):
        weight = linear.weight.detach()
        made = dense_linear((weight[start:stop] if column else weight[:, start:stop]).clone(), kept)
        made.weight.requires_grad_(linear.weight.requires_grad)
    else:
        raise TypeError(f"{name}: expected torch.nn.Linear or SparseMarlinLinear, got {type(linear).__name__}")
    if kept is not None:
        made.bias.requires_grad_(old.requires_grad)
    return made.train(linear.training)


def _cut_correction(whole: Any, part: Any, column: bool, features: Range, name: str) -> None:
    """The low-rank correction beside the weight, if there is one: its outputs, or its inputs, are cut with it. The sum
    over the ranks of `up @ (down[:, part] @ x[part])` is the whole correction."""
    up, down = getattr(whole, "correction_up", None), getattr(whole, "correction_down", None)
    if up is None or down is None:
        return
    start, stop = features
    rows = slice(start, stop) if column else slice(None)
    if whole.packed_correction:
        scales, columns = whole.correction_scales, tail_columns(whole.rank)
        codes = unpack_24_weights(up, whole.out_features, columns, whole.num_bits)[rows]
        up = QuantizedWeight(codes, scales[:, rows], whole.group_size, whole.num_bits)
    else:
        up = up[rows]
    part._set_correction(name, up, down if column else down[:, start:stop])


def dense_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """A linear that holds these tensors, frozen."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias, requires_grad=False)
    return made


def column_parallel(linear: nn.Module, *, gather_output: bool = False, group: Group = None) -> ColumnParallelLinear:
    """This rank's part of a whole linear, by output features."""
    _, world_size = rank_and_size(group)
    return _parallel(linear, Cut(True, split_layer(linear, world_size, True), gather_output), group, "column_parallel")


def row_parallel(linear: nn.Module, *, split_input: bool = False, group: Group = None) -> RowParallelLinear:
    """This rank's part of a whole linear, by input features."""
    _, world_size = rank_and_size(group)
    return _parallel(linear, Cut(False, split_layer(linear, world_size, False), split_input), group, "row_parallel")


def _parallel(linear: nn.Module, cut: Cut, group: Group, name: str) -> Any:
    rank, _ = rank_and_size(group)
    part = cut_linear(linear, cut.column, cut.ranges[rank], bias=cut.column or rank == 0, name=name)
    return wrap_part(part, cut, group)


def wrap_part(part: nn.Module, cut: Cut, group: Group = None) -> ColumnParallelLinear | RowParallelLinear:
    """The parallel layer around this rank's part of a linear."""
    if cut.column:
        return ColumnParallelLinear(part, cut.ranges, gather_output=cut.whole, group=group).train(part.training)
    return RowParallelLinear(part, cut.ranges, split_input=cut.whole, group=group).train(part.training)


# --- models -----------------------------------------------------------------------------------------------------------


@dataclass
class ParallelReport:
    """What became of every linear on this rank; `str()` is a summary."""

    rank: int
    world_size: int
    cuts: dict[str, Cut]
    whole: dict[str, str] = field(default_factory=dict)  # layer -> why every rank holds all of it
    bytes_before: int = 0
    bytes_after: int = 0

    def __str__(self) -> str:
        lines = [
            f"rank {self.rank} of {self.world_size}: {len(self.cuts)} linears cut, {len(self.whole)} whole, "
            f"{self.bytes_before / 1e6:.1f} MB -> {self.bytes_after / 1e6:.1f} MB"
        ]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.whole.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"whole on every rank: {names[0]}{more}: {reason}")
        return "\n".join(lines)


def tensor_parallel(model: nn.Module, group: Group = None) -> ParallelReport:
    """Cut a whole model to this rank's part, in place; every rank must call it with the same model.

    The linears that the model's tensor-parallel plan names are cut, packed and dense ones alike; embeddings, norms and
    linears that cannot be cut stay whole on every rank (see the report). After it the model runs as before, on every
    rank with the same inputs, and gives every rank the whole result. Save a model before it is cut.

    Raises:
        ValueError: a model without such a plan, or one that is merged or cut already. The model is left as it was.
    """
    rank, world_size = rank_and_size(group)
    if is_cut(model):
        raise ValueError("tensor_parallel: model: expected a whole model, got one that is cut already")
    if any(isinstance(module, MergedPart) for module in model.modules()):
        raise ValueError(
            "tensor_parallel: model: expected layers with weights of their own, got merged ones; call "
            "unmerge_linears(model) first, and merge_linears again for the parts"
        )
    before = module_bytes(model)
    plan = make_plan(model, world_size)
    made: dict[str, nn.Module] = {
        name: _parallel(model.get_submodule(name), cut, group, name) for name, cut in plan.cuts.items()
    }
    return install_parts(model, plan, made, rank, before)


def is_cut(model: nn.Module) -> bool:
    """Whether a model has only a rank's part of its layers."""
    return any(isinstance(module, (ColumnParallelLinear, RowParallelLinear)) for module in model.modules())


def install_parts(
    model: nn.Module, plan: ShardPlan, made: Mapping[str, nn.Module], rank: int, before: int
) -> ParallelReport:
    """Put the parts of this rank in the places of the whole layers; `before` are the bytes of the whole model."""
    for name, layer in made.items():
        parent, _, attribute = name.rpartition(".")
        model.get_submodule(parent)._modules[attribute] = layer
    for name, heads in plan.heads.items():
        _set_heads(model.get_submodule(name), *heads[rank])
    if hasattr(model, "_tp_size"):
        setattr(model, "_tp_size", plan.world_size)  # noqa: B010  transformers sizes static caches by it
    return ParallelReport(rank, plan.world_size, plan.cuts, plan.reasons, before, module_bytes(model))


def _set_heads(attention: Any, queries: int, keys: int) -> None:
    """What attention modules remember of their heads; most read them off the projections' outputs."""
    attention.num_key_value_groups = queries // keys
    for attribute, count in (("num_heads", queries), ("num_key_value_heads", keys)):
        if isinstance(getattr(attention, attribute, None), int):
            setattr(attention, attribute, count)
