"""Which part of every linear layer a rank of a tensor-parallel group holds: pure planning, no process, no data.

The plan follows the model's own `tp_plan` (transformers): "colwise" layers are cut along their output features,
"rowwise" layers along their input features, and layers of one module that feed each other are cut together or stay
whole together. Attention is cut at heads, every rank with the key and value heads that its query heads read: where
there are fewer of those than ranks, several ranks hold the same one. Everything else is cut at tiles of the packed
format and whole scale groups, as evenly as these allow. Shares need not be equal, so any world size works as long as
every rank gets something; what cannot be cut stays whole on every rank, with the reason.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ._extension import _core
from .linear import SparseMarlinLinear
from .quantize import CHANNELWISE, QUAD
from .slicing import FINITE_GROUP_SIZES

Range = tuple[int, int]  # start, stop

# What transformers calls the ways to cut a linear, in its older and newer releases: (cut along output features, the
# other side whole on every rank: output gathered, or input cut by the layer itself).
_STYLES = {
    "colwise": (True, False),
    "colwise_rep": (True, True),
    "colwise_gather_output": (True, True),
    "rowwise": (False, False),
    "rowwise_rep": (False, True),
    "rowwise_split_input": (False, True),
}
_HEADS = {"q_proj": "q", "k_proj": "kv", "v_proj": "kv", "o_proj": "q"}


@dataclass(frozen=True)
class Cut:
    """How one linear is shared out: the range of every rank, along output features (column) or input features."""

    column: bool
    ranges: tuple[Range, ...]
    whole: bool  # column: the output is gathered on every rank; row: the input is whole and cut by the layer


@dataclass
class ShardPlan:
    """Cuts by the name of the layer, query and key/value heads of every rank by the name of the attention module, and
    why the other linears stay whole."""

    world_size: int
    cuts: dict[str, Cut] = field(default_factory=dict)
    heads: dict[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def split_evenly(size: int, world_size: int, unit: int = 1) -> tuple[Range, ...]:
    """`world_size` consecutive ranges of whole units (the last unit may be short), the larger ones first.

    Raises:
        ValueError: fewer units than ranks.
    """
    units = -(-size // unit)
    if units < world_size:
        raise ValueError(f"expected at least {world_size} pieces of {unit}, got {size} features")
    share, extra = divmod(units, world_size)
    bounds = [min((rank * share + min(rank, extra)) * unit, size) for rank in range(world_size + 1)]
    return tuple(itertools.pairwise(bounds))


def split_heads(num_heads: int, num_kv_heads: int, world_size: int) -> tuple[tuple[Range, Range], ...]:
    """(query heads, key/value heads) of every rank; all query heads of a rank read its own key/value heads, each the
    same number of them.

    Raises:
        ValueError: fewer query heads than ranks, or query heads that are no multiple of the key/value heads.
    """
    if num_heads % num_kv_heads:
        raise ValueError(f"expected query heads in multiples of the {num_kv_heads} key/value heads, got {num_heads}")
    readers = num_heads // num_kv_heads
    if world_size <= num_kv_heads:
        kv = split_evenly(num_kv_heads, world_size)
        return tuple(((start * readers, stop * readers), (start, stop)) for start, stop in kv)
    shares: list[tuple[Range, Range]] = []
    for head, (first, last) in enumerate(split_evenly(world_size, num_kv_heads)):  # the ranks of one key/value head
        for start, stop in split_evenly(readers, last - first):
            shares.append(((head * readers + start, head * readers + stop), (head, head + 1)))
    return tuple(shares)


def is_linear(module: nn.Module) -> bool:
    return type(module) in (nn.Linear, SparseMarlinLinear)


def linear_sizes(module: nn.Module) -> Range:
    """(N, K) of a linear."""
    return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]


def make_plan(model: nn.Module, world_size: int) -> ShardPlan:
    """The plan for a Llama-shaped transformers model, also on the meta device.

    Raises:
        ValueError: the model has no tensor-parallel plan.
    """
    styles = _model_styles(model)
    plan = ShardPlan(world_size)
    tied = _tied_parameters(model)
    for parent_name, parent in model.named_modules():
        planned: dict[str, tuple[bool, bool]] = {}
        for child_name, child in parent.named_children():
            if not is_linear(child):
                continue
            name = f"{parent_name}.{child_name}".lstrip(".")
            style = styles.get(_pattern(name))
            if style is None:
                plan.reasons[name] = "not in the model's tensor-parallel plan"
            elif style not in _STYLES:
                plan.reasons[name] = f"tensor-parallel style '{style}' is not one of a linear layer"
            elif id(getattr(child, "weight", child)) in tied:
                plan.reasons[name] = "its weight is shared with another module"
            else:
                planned[child_name] = _STYLES[style]
        if planned:
            cut_with_them = [
                key for key in parent._parameters if styles.get(_pattern(f"{parent_name}.{key}")) in _STYLES
            ]
            _plan_module(plan, parent_name, parent, planned, cut_with_them)
    return plan


def _plan_module(
    plan: ShardPlan, name: str, module: nn.Module, planned: dict[str, tuple[bool, bool]], parameters: list[str]
) -> None:
    """The linears of one module: all of them, or none where a layer between them could not be cut to match."""

    def full(child: str) -> str:
        return f"{name}.{child}".lstrip(".")

    alone = {child for child, (_, whole) in planned.items() if whole}
    together = {child: column for child, (column, whole) in planned.items() if not whole}
    for child in alone:
        layer = module._modules[child]
        assert layer is not None
        try:
            column = planned[child][0]
            plan.cuts[full(child)] = Cut(column, split_layer(layer, plan.world_size, column), True)
        except ValueError as error:
            plan.reasons[full(child)] = str(error)
    if not together:
        return
    try:
        if parameters:
            raise ValueError(f"the parameter {parameters[0]} beside it would have to be cut, too")
        if hasattr(module, "num_key_value_groups"):
            ranges, heads = _attention_ranges(module, together, plan.world_size)
            plan.heads[name] = heads
        else:
            ranges = _feed_forward_ranges(module, together, plan.world_size)
        for child, column in together.items():
            plan.cuts[full(child)] = Cut(column, ranges[child], False)
    except ValueError as error:
        plan.reasons.update({full(child): str(error) for child in together})


def split_layer(layer: nn.Module, world_size: int, column: bool) -> tuple[Range, ...]:
    """Ranges for a layer on its own: whole tiles, whole scale groups; finer where there are too few of them."""
    size = linear_sizes(layer)[0 if column else 1]
    return _split([(layer, column)], size, world_size)


def _split(layers: Iterable[tuple[nn.Module, bool]], size: int, world_size: int) -> tuple[Range, ...]:
    for unit in _units(layers):
        if -(-size // unit) >= world_size:
            return split_evenly(size, world_size, unit)
    raise ValueError(f"{size} features are too few for {world_size} ranks")


def _units(layers: Iterable[tuple[nn.Module, bool]]) -> list[int]:
    """Multiples at which all these layers may be cut along this side: first whole tiles and scale groups, then halves
    of that as far as the scales allow. All are powers of two."""
    unit = smallest = 1
    for layer, column in layers:
        if not isinstance(layer, SparseMarlinLinear):
            continue
        unit = math.lcm(unit, _core.TILE_ROWS if column else _core.TILE_COLS)
        if not column:
            smallest = math.lcm(smallest, QUAD)
            if layer.group_size != CHANNELWISE:
                unit, smallest = math.lcm(unit, layer.group_size), math.lcm(smallest, FINITE_GROUP_SIZES[0])
    units = [unit]
    while units[-1] > smallest:
        units.append(units[-1] // 2)
    return units


def _feed_forward_ranges(module: nn.Module, together: dict[str, bool], world_size: int) -> dict[str, tuple[Range, ...]]:
    layers = {child: module._modules[child] for child in together}
    sizes = {linear_sizes(layer)[0 if together[child] else 1] for child, layer in layers.items() if layer is not None}
    if len(sizes) > 1 or len(set(together.values())) < 2:
        raise ValueError(
            f"{', '.join(together)} do not make a pair of column and row layers with one inner size, so they cannot be "
            "cut together"
        )
    ranges = _split([(layer, together[child]) for child, layer in layers.items() if layer], sizes.pop(), world_size)
    return dict.fromkeys(together, ranges)


def _attention_ranges(
    module: nn.Module, together: dict[str, bool], world_size: int
) -> tuple[dict[str, tuple[Range, ...]], tuple[tuple[int, int], ...]]:
    unknown = set(together) ^ set(_HEADS)
    if unknown:
        raise ValueError(
            f"expected an attention of {', '.join(_HEADS)}, got a difference in {', '.join(sorted(unknown))}"
        )
    head_dim, readers = int(module.head_dim), int(module.num_key_value_groups)  # type: ignore[arg-type]
    query_size = linear_sizes(module.get_submodule("q_proj"))[0]
    key_size = linear_sizes(module.get_submodule("k_proj"))[0]
    if query_size != key_size * readers or key_size % head_dim:
        raise ValueError(
            f"q_proj: expected {readers} query heads of {head_dim} for every key/value head of {key_size} features, "
            f"got {query_size} features"
        )
    if world_size > query_size // head_dim:
        raise ValueError(f"{query_size // head_dim} query heads are too few for {world_size} ranks")
    shares = split_heads(query_size // head_dim, key_size // head_dim, world_size)
    output = module.get_submodule("o_proj")
    if isinstance(output, SparseMarlinLinear) and output.group_size != CHANNELWISE:
        smallest = min(output.group_size, FINITE_GROUP_SIZES[0])
        if any(query[0] * head_dim % smallest for query, _ in shares):
            raise ValueError(
                f"o_proj: heads of {head_dim} features cannot be cut into scale groups of at least {smallest}"
            )
    ranges = {
        child: tuple(
            (start * head_dim, stop * head_dim)
            for start, stop in (share[0 if _HEADS[child] == "q" else 1] for share in shares)
        )
        for child in together
    }
    heads = tuple((query[1] - query[0], keys[1] - keys[0]) for query, keys in shares)
    return ranges, heads


def _model_styles(model: nn.Module) -> dict[str, str]:
    """The model's plan: layer names, numbers replaced by '*', to styles."""
    found: dict[str, str] = dict(getattr(model, "tp_plan", None) or getattr(model, "_tp_plan", None) or {})
    config: Any = getattr(model, "config", None)
    base = getattr(config, "base_model_tp_plan", None) or {}
    prefix = getattr(model, "base_model_prefix", "")
    inner = f"{prefix}." if prefix and hasattr(model, prefix) else ""
    for pattern, style in base.items():
        found.setdefault(inner + pattern, style)
    if not found:
        raise ValueError(
            f"tensor_parallel: model: expected a transformers model with a tensor-parallel plan (tp_plan), "
            f"got {type(model).__name__} without one; cut its layers with sparse_marlin.parallel.column_parallel and "
            "row_parallel"
        )
    return {pattern.removesuffix(".weight"): style for pattern, style in found.items()}


def _pattern(name: str) -> str:
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name)


def _tied_parameters(model: nn.Module) -> set[int]:
    """Parameters with more than one owner: cutting one of them would leave two copies."""
    seen: set[int] = set()
    tied: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                (tied if id(parameter) in seen else seen).add(id(parameter))
    # On the meta device ties may not be made yet.
    config: Any = getattr(model, "config", None)
    find: Any = getattr(model, "get_output_embeddings", None)
    output = find() if find is not None else None
    if getattr(config, "tie_word_embeddings", False) and isinstance(output, nn.Linear):
        tied.add(id(output.weight))
    return tied
