"""Replacing the linear layers of a model: which ones qualify (`survey`), and the swap itself (`convert_linears`).

`replace_linears` is the weight-only conversion. A better method brings its own function from a layer to a
`QuantizedWeight` and calls `convert_linears`; selection, atomicity and the report stay the same. All replacements are
computed before the first one is put in place, so an error on the way leaves the model exactly as it was.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ._progress import tracked
from .checkpoint import attach_config
from .linear import SparseMarlinLinear
from .quantize import QUAD, SCALE_DTYPES, QuantizedWeight, quantize_weight_only, relative_error
from .report import ConversionReport, LayerReport

DEFAULT_IGNORE: tuple[str, ...] = ("lm_head",)

# Modules that read `.weight` of a linear child by themselves, instead of calling the child.
_WEIGHT_READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)

# From the full name of a layer and the layer to its codes and scales.
QuantizeLayer = Callable[[str, nn.Linear], QuantizedWeight]


@dataclass
class Candidate:
    """A linear layer found in a model, every place it is registered at, and why it has to stay dense (None: it need
    not)."""

    name: str
    module: nn.Module
    places: list[tuple[nn.Module, str]] = field(default_factory=list)
    reason: str | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.module.out_features), int(self.module.in_features)  # type: ignore[arg-type]

    @property
    def nbytes(self) -> int:
        return module_bytes(self.module)

    @property
    def weight(self) -> torch.Tensor:
        """The weight [out_features, in_features] of a dense layer, detached."""
        assert isinstance(self.module, nn.Linear)
        return self.module.weight.detach()


def module_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    tensors = {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()] if not is_lazy(tensor)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def replace_linears(
    model: nn.Module,
    *,
    group_size: int = 128,
    num_bits: int = 4,
    ignore: str | Iterable[str] = DEFAULT_IGNORE,
    progress: bool = False,
) -> ConversionReport:
    """Replace the linears of `model` in place by 2:4-sparse ones, from their weights alone: the two largest of every
    four stay.

    `ignore` names what stays dense: class names, full module names, last components of names ("lm_head"), or `re:` and
    a pattern that the full name starts with. An entry that matches a container covers everything inside it.
    """

    def quantize_layer(name: str, linear: nn.Linear) -> QuantizedWeight:
        return quantize_weight_only(linear.weight.detach(), group_size=group_size, num_bits=num_bits, name=name)

    return convert_linears(
        model,
        quantize_layer,
        method="weight-only magnitude 2:4",
        group_size=group_size,
        num_bits=num_bits,
        ignore=ignore,
        progress=progress,
    )


def convert_linears(
    model: nn.Module,
    quantize_layer: QuantizeLayer,
    *,
    method: str,
    group_size: int,
    num_bits: int,
    ignore: str | Iterable[str] = DEFAULT_IGNORE,
    progress: bool = False,
) -> ConversionReport:
    """Replace every qualifying linear of `model` by the layer made of `quantize_layer`'s codes. In place, all or
    nothing."""
    selection = select(model, ignore, group_size=group_size, num_bits=num_bits)
    made: dict[str, Replacement | str] = {}
    for candidate in tracked(selection.chosen, "Converting linears", progress):
        made[candidate.name] = _convert(candidate, quantize_layer)
    return install(model, selection, made, method=method)


@dataclass
class Selection:
    """The linears of a model, those to convert among them, and the settings they are converted with."""

    candidates: list[Candidate]
    entries: tuple[str, ...]  # of `ignore`
    group_size: int
    num_bits: int

    @property
    def chosen(self) -> list[Candidate]:
        return [candidate for candidate in self.candidates if candidate.reason is None]


@dataclass(frozen=True)
class Replacement:
    """What comes in the place of a linear, with its errors for the report. A `reason` says why it is a dense layer
    after all (with other values than before)."""

    layer: nn.Module
    relative_error: float
    output_error: float | None = None
    reason: str | None = None


def select(
    model: nn.Module,
    ignore: str | Iterable[str] = DEFAULT_IGNORE,
    *,
    group_size: int,
    num_bits: int,
    caller: str = "replace_linears",
) -> Selection:
    """The linears that a conversion with these settings converts. ValueError if there are none, or if a setting is
    wrong: before any work is done."""
    entries = _ignore_entries(ignore)
    selection = Selection(survey(model, entries), entries, group_size, num_bits)
    if not selection.chosen:
        raise ValueError(f"{caller}: model: expected a linear layer to convert, got {_why_none(selection.candidates)}")
    # One probe on the meta device shows a wrong group_size or num_bits.
    SparseMarlinLinear(QUAD, 1, group_size=group_size, num_bits=num_bits, device="meta")
    return selection


def install(
    model: nn.Module, selection: Selection, made: Mapping[str, Replacement | str], *, method: str
) -> ConversionReport:
    """Put the replacements in place, all of them, and report. A text instead of a replacement is the reason why that
    linear stays dense after all."""
    rows = []
    for candidate in selection.candidates:
        new = made.get(candidate.name, candidate.reason or "not converted")
        replaced = new if isinstance(new, Replacement) else None
        reason = replaced.reason if replaced else str(new)
        before = candidate.nbytes
        rows.append(
            LayerReport(
                name=candidate.name,
                shape=candidate.shape,
                converted=reason is None,
                reason=reason,
                relative_error=replaced.relative_error if replaced else None,
                bytes_before=before,
                bytes_after=module_bytes(replaced.layer) if replaced else before,
                output_error=replaced.output_error if replaced else None,
            )
        )
    notes = _notes(model, selection.entries, selection.chosen)
    report = ConversionReport(rows, selection.group_size, selection.num_bits, method, notes)
    for candidate in selection.chosen:
        replacement = made.get(candidate.name)
        if isinstance(replacement, Replacement):
            for parent, attribute in candidate.places:
                parent._modules[attribute] = replacement.layer  # what setattr would do, without a hook that could fail
    attach_config(model)
    return report


def survey(
    model: nn.Module, ignore: str | Iterable[str] = DEFAULT_IGNORE, *, allow_meta: bool = False
) -> list[Candidate]:
    """All linear layers of `model` in module order, each with the reason why it cannot be converted, if there is
    one."""
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"replace_linears: model: expected an eager torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, (nn.Linear, SparseMarlinLinear)):
        raise ValueError(
            "replace_linears: model: expected a module that contains linear layers, "
            f"got a {type(model).__name__} itself; use SparseMarlinLinear.from_linear"
        )
    entries = _ignore_entries(ignore)
    owners = _weight_owners(model)
    found: dict[int, Candidate] = {}
    for parent_name, parent in model.named_modules(remove_duplicate=False):
        for attribute, child in parent._modules.items():
            if not isinstance(child, (nn.Linear, SparseMarlinLinear)):
                continue
            name = f"{parent_name}.{attribute}" if parent_name else attribute
            candidate = found.setdefault(id(child), Candidate(name, child))
            if not any(place[0] is parent and place[1] == attribute for place in candidate.places):
                candidate.places.append((parent, attribute))
            candidate.reason = (
                candidate.reason
                or _ignored_by(model, name, entries)
                or _parent_objects(parent)
                or _unfit(child, owners, allow_meta)
            )
    order = {id(module): position for position, module in enumerate(model.modules())}
    return sorted(found.values(), key=lambda candidate: order[id(candidate.module)])


def _convert(candidate: Candidate, quantize_layer: QuantizeLayer) -> Replacement:
    linear = candidate.module
    assert isinstance(linear, nn.Linear)
    try:
        quantized = quantize_layer(candidate.name, linear)
        layer = SparseMarlinLinear.from_codes(
            quantized.codes,
            quantized.scales,
            linear.bias,
            group_size=quantized.group_size,
            num_bits=quantized.num_bits,
        ).train(linear.training)
        return Replacement(layer, relative_error(linear.weight, quantized))
    except (ValueError, TypeError, RuntimeError) as error:
        text = str(error)
        if text.startswith(candidate.name + ":"):
            raise
        kind = type(error) if type(error) in (ValueError, TypeError) else RuntimeError
        raise kind(f"{candidate.name}: {text}") from error


def _unfit(module: nn.Module, owners: dict[object, list[tuple[str, nn.Module]]], allow_meta: bool) -> str | None:
    """Why this layer itself cannot be converted."""
    if isinstance(module, SparseMarlinLinear):
        return "already a SparseMarlinLinear"
    assert isinstance(module, nn.Linear)
    if type(module).forward is not nn.Linear.forward or "forward" in vars(module):
        return f"{type(module).__name__} has a forward of its own"
    if getattr(module, "parametrizations", None):
        return "its weight is parametrized; call remove_parametrizations first"
    if is_lazy(module.weight):
        return "it is lazy: run the model once first"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "it has hooks, which a replacement would lose; remove them first"
    weight = module.weight
    if weight.dtype not in SCALE_DTYPES:
        return f"weight is {str(weight.dtype).removeprefix('torch.')}, not float32, float16 or bfloat16"
    if weight.dim() != 2 or tuple(weight.shape) != (module.out_features, module.in_features):
        return f"weight has shape {list(weight.shape)}, not [out_features, in_features]"
    if module.in_features < QUAD or module.in_features % QUAD:
        return f"in_features {module.in_features} is not divisible by {QUAD}"
    if module.out_features < 1:
        return "it has no output features"
    if weight.is_meta:
        return None if allow_meta else "weight is on the meta device (not loaded, or offloaded)"
    others = [name for name, owner in owners.get(_storage_key(weight), []) if owner is not module]
    return f"weight is shared with {', '.join(others)}" if others else None


def _parent_objects(parent: nn.Module) -> str | None:
    if isinstance(parent, _WEIGHT_READERS):
        return f"its parent {type(parent).__name__} reads the weight directly"
    return None


def _storage_key(tensor: torch.Tensor) -> object:
    if is_lazy(tensor) or tensor.is_meta or tensor.numel() == 0:
        return id(tensor)
    return (str(tensor.device), tensor.data_ptr())


def _weight_owners(model: nn.Module) -> dict[object, list[tuple[str, nn.Module]]]:
    """Where each parameter's memory is used: tied weights have more than one owner."""
    owners: dict[object, list[tuple[str, nn.Module]]] = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[_storage_key(parameter)].append((name, module))
    return owners


def _ignore_entries(ignore: str | Iterable[str]) -> tuple[str, ...]:
    entries = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    for entry in entries:
        if not isinstance(entry, str):
            raise TypeError(f"replace_linears: ignore: expected strings, got {type(entry).__name__}")
        if entry.startswith("re:"):
            try:
                re.compile(entry[3:])
            except re.error as error:
                raise ValueError(
                    f"replace_linears: ignore: expected a regular expression after 're:', got '{entry}' ({error})"
                ) from None
    return entries


def _matches(entry: str, name: str, module: nn.Module) -> bool:
    if entry.startswith("re:"):
        return re.match(entry[3:], name) is not None
    return entry in (name, name.rpartition(".")[2], type(module).__name__)


def _ignored_by(model: nn.Module, name: str, entries: Sequence[str]) -> str | None:
    """The first entry that matches the layer or a container around it."""
    parts = name.split(".")
    module: nn.Module | None = model
    for depth, part in enumerate(parts):
        module = module._modules[part] if module is not None else None
        if module is None:
            break
        path = ".".join(parts[: depth + 1])
        for entry in entries:
            if _matches(entry, path, module):
                return f"ignored by '{entry}'"
    return None


def _notes(model: nn.Module, entries: Sequence[str], chosen: Sequence[Candidate]) -> list[str]:
    notes = []
    modules = list(model.named_modules())[1:]
    for entry in entries:
        if entry not in DEFAULT_IGNORE and not any(_matches(entry, name, module) for name, module in modules):
            notes.append(f"ignore entry '{entry}' matches no module")
    wide = [c for c in chosen if isinstance(c.module, nn.Linear) and c.module.weight.dtype == torch.float32]
    if wide and wide[0].module.weight.is_cuda:
        notes.append(
            "the model is float32 on a GPU, where the kernels take float16 and bfloat16: call .half() or .bfloat16()"
        )
    return notes


def _why_none(candidates: Sequence[Candidate]) -> str:
    if not candidates:
        return "a model without torch.nn.Linear layers"
    reasons: dict[str, list[str]] = defaultdict(list)
    for candidate in candidates:
        reasons[candidate.reason or ""].append(candidate.name)
    parts = [
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {reason}"
        for reason, names in reasons.items()
    ]
    return f"{len(candidates)} that stay dense ({'; '.join(parts)})"
