"""One block after the other, each on the activations that the compressed blocks before it produce.

Within a block, linears with the same input are one group. For each group in the order of the forward: run the block on
all calibration batches up to the group's input, accumulate H, solve, and put the result into the dense weights, so that
the next group sees it. At the end the block runs once more to its output, which is the next block's input. The default
quality aims at what the dense model returns (`reference`): its hidden states go along. The model's modules are not
touched, and weights that were exchanged come back when the block is left.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .._progress import TwoBars
from ..linear import SparseMarlinLinear
from ..quantize import relative_error
from ..replace import Candidate, Replacement
from .blocks import Block, Call, FinishedParts, Group, GroupHook, run_block, shared_inputs
from .correction import Factors, corrected
from .hessian import Hessian, HessianAccumulator, output_error
from .problem import Problem, Solution
from .reference import Gap, Reference, ReferenceInputs, followed
from .solvers import DEFAULT_QUALITY, Solver
from .state import State, dense_twin
from .sweep import joint_sweep

FALLBACKS = ("dense", "int4")
DEFAULT_DAMPING = 0.1  # best on text of several kinds, none of it calibrated on (docs/ACCURACY.md)
_TURNS = 2  # of codes and correction
FOLLOW = 1.0  # share of the inputs' errors that the default quality makes good (docs/ACCURACY.md)
_KEEP_ON_DEVICE_BYTES = 10_000_000_000  # of hidden states; more are kept in host memory
_KEEP_INSIDE_BYTES = 1_000_000_000  # of what is computed inside a block, for later passes


@dataclass(frozen=True)
class Settings:
    """How linears are compressed."""

    quality: str
    solve: Solver
    group_size: int
    num_bits: int
    rank: int
    shared_correction: bool
    max_error: float | None
    fallback: str
    scale_dtype: torch.dtype | None  # None: the weight's
    damping: float

    @property
    def follow(self) -> float:
        """Share of the gap to the dense model's inputs that targets make good."""
        return FOLLOW if self.quality == DEFAULT_QUALITY else 0.0

    @property
    def method(self) -> str:
        shared = "shared " if self.shared_correction else ""
        return self.quality + (f", {shared}correction of rank {self.rank}" if self.rank else "")


class BlockRun:
    """Compresses blocks on `device`. `patterns`: fixed masks [N, K] by name of the linear."""

    def __init__(
        self, settings: Settings, patterns: Mapping[str, torch.Tensor], device: torch.device, state: State
    ) -> None:
        self.settings, self.patterns, self.device, self.state = settings, patterns, device, state
        self._shelf = device

    def store(self, hidden: list[torch.Tensor]) -> list[torch.Tensor]:
        """Hidden states where there is room for them between two uses."""
        total = sum(tensor.numel() * tensor.element_size() for tensor in hidden) * (2 if self.settings.follow else 1)
        self._shelf = self.device if total <= _KEEP_ON_DEVICE_BYTES else torch.device("cpu")
        return [tensor.to(self._shelf) for tensor in hidden]

    @torch.no_grad()
    def block(
        self,
        index: int,
        block: Block,
        hidden: list[torch.Tensor],
        dense: list[torch.Tensor],
        calls: list[Call],
        fingerprint: str,
        bars: TwoBars,
        *,
        propagate: bool,
    ) -> dict[str, Replacement | str]:
        """What becomes of the block's linears; with `propagate`, `hidden` becomes the block's outputs, in place, and so
        do the hidden states of the `dense` model where they are followed."""
        parts, reference = FinishedParts(block, _KEEP_INSIDE_BYTES), None
        try:
            with _lent(block.module, self.device):
                if self.settings.follow:
                    reference = Reference(block, _KEEP_INSIDE_BYTES)
                made = self.state.load(index, fingerprint, block.linears) if block.linears else {}
                if made is None:
                    made = self._compress(block, hidden, dense, calls, parts, reference, bars)
                    self.state.save(index, fingerprint, made)
                else:
                    for candidate in block.linears:
                        _exchange(candidate, made[candidate.name])
                    bars.line(f"{block.name}: {len(made)} linears finished before")
                if propagate:
                    bars.inner("propagating", len(hidden))
                    for number, call in enumerate(calls):
                        parts.batch(number)
                        moved = _moved(call, self.device)
                        out = run_block(block.module, hidden[number].to(self.device), moved)
                        hidden[number] = out.to(self._shelf)
                        if reference is not None:
                            out = reference.output(number, dense[number].to(self.device), moved)
                            dense[number] = out.to(self._shelf)
                        bars.step()
        finally:
            parts.close()
            if reference is not None:
                reference.close()
        for candidate in block.linears:
            new = made[candidate.name]
            if isinstance(new, Replacement):
                new.layer.to(candidate.weight.device)
        return made

    def _compress(
        self,
        block: Block,
        hidden: list[torch.Tensor],
        dense: list[torch.Tensor],
        calls: list[Call],
        parts: FinishedParts,
        reference: Reference | None,
        bars: TwoBars,
    ) -> dict[str, Replacement | str]:
        made: dict[str, Replacement | str] = {}
        groups = shared_inputs(block, hidden[0].to(self.device), _moved(calls[0], self.device))
        for group in groups:
            start = time.perf_counter()
            names = ", ".join(candidate.name.rpartition(".")[2] for candidate in group.linears)
            beside = reference.inputs(group) if reference is not None and group.calls == 1 else None
            hessian = self._hessian(block, group, hidden, dense, calls, parts, beside, bars, names)
            if hessian is None:
                made.update({candidate.name: "no calibration token reached it" for candidate in group.linears})
                continue
            bars.inner(f"{names}: solving", None)
            gap = beside.gap(hessian) if beside is not None else None
            for linears in self._alike(group.linears):
                made.update(self._solve(linears, hessian, gap, bars, start))
            for passes in (parts, reference):
                if passes is not None:
                    passes.finish(set(made), again=group is not groups[-1])
        return made

    def _hessian(
        self,
        block: Block,
        group: Group,
        hidden: list[torch.Tensor],
        dense: list[torch.Tensor],
        calls: list[Call],
        parts: FinishedParts,
        beside: ReferenceInputs | None,
        bars: TwoBars,
        names: str,
    ) -> Hessian | None:
        first = group.linears[0]
        sums = HessianAccumulator(first.shape[1], self.device, first.name)
        seen: list[torch.Tensor] = []

        def collect(inputs: torch.Tensor) -> None:
            sums.add(inputs)
            parts.keep_inputs(group, inputs)
            seen.append(inputs)

        hook = GroupHook(group, collect)
        bars.inner(f"{names}: calibrating", len(hidden))
        try:
            for number, (states, call) in enumerate(zip(hidden, calls, strict=True)):
                parts.batch(number)
                seen.clear()
                moved = _moved(call, self.device)
                hook.run(block.module, states.to(self.device), moved)
                if beside is not None:
                    beside.add(number, dense[number].to(self.device), moved, seen)
                bars.step()
        finally:
            hook.remove()
            if beside is not None:
                beside.remove()
        if not sums.tokens and not group.calls:
            return None
        hessian = Hessian(sums.finish(), self.settings.damping)
        if hessian.damping > self.settings.damping:
            bars.line(f"{first.name}: damping raised to {hessian.damping:g}, since H is singular in float32")
        return hessian

    def _alike(self, linears: list[Candidate]) -> list[list[Candidate]]:
        """Linears that one problem can hold: of one dtype, all with a fixed pattern or none."""
        sets: dict[object, list[Candidate]] = {}
        for candidate in linears:
            sets.setdefault((candidate.weight.dtype, candidate.name in self.patterns), []).append(candidate)
        return list(sets.values())

    def _solve(
        self, linears: list[Candidate], hessian: Hessian, gap: Gap | None, bars: TwoBars, start: float
    ) -> dict[str, Replacement | str]:
        settings = self.settings
        weights = [candidate.weight for candidate in linears]
        rows, end = [], 0
        for weight in weights:
            rows.append(slice(end, end + weight.shape[0]))
            end += weight.shape[0]
        masks = [self.patterns[c.name].to(self.device) for c in linears if c.name in self.patterns]
        target = torch.cat([weight.float() for weight in weights]).t().contiguous()
        problem = Problem(
            target if gap is None else followed(target, hessian, gap, settings.follow),
            hessian,
            settings.group_size,
            settings.num_bits,
            settings.scale_dtype or weights[0].dtype,
            torch.cat(masks).t().contiguous() if masks else None,
            lambda _: bars.step(),
        )
        solution = settings.solve(problem)
        factors: list[Factors | None] = [None] * len(linears)
        if settings.rank and isinstance(solution, Solution):
            turns = _TURNS if settings.quality == DEFAULT_QUALITY else 0
            solution, found = corrected(
                problem, solution, rows, settings.rank, shared=settings.shared_correction, turns=turns
            )
            factors = list(found)
        made: dict[str, Replacement | str] = {}
        for candidate, part, correction in zip(linears, rows, factors, strict=True):
            new: Replacement | str = _replacement(candidate, problem, solution, part, correction)
            error = new.output_error if isinstance(new, Replacement) else None
            if settings.max_error is not None and error is not None and not error <= settings.max_error:
                new = self._fall_back(candidate, problem, part, error)
            made[candidate.name] = new
            bars.line(_line(candidate, new, time.perf_counter() - start))
            _exchange(candidate, new)
        return made

    def _fall_back(self, candidate: Candidate, problem: Problem, rows: slice, error: float) -> Replacement | str:
        """What a linear becomes whose error is over the limit."""
        reason = f"output error {error:.4f} is over {self.settings.max_error:g}"
        if self.settings.fallback == "dense":
            return reason
        everything = torch.ones_like(problem.target[:, rows], dtype=torch.bool)
        own = Problem(
            problem.target[:, rows].contiguous(),
            problem.hessian,
            problem.group_size,
            4,
            problem.scale_dtype,
            everything,
        )
        values = joint_sweep(own).values(own)
        return _dense(candidate, own, values, slice(None), f"{reason}: rounded to 4 bits without pruning")


def _replacement(
    candidate: Candidate,
    problem: Problem,
    solution: Solution | torch.Tensor,
    rows: slice,
    correction: Factors | None,
) -> Replacement:
    linear = candidate.module
    assert isinstance(linear, nn.Linear)
    if isinstance(solution, torch.Tensor):
        return _dense(candidate, problem, solution[:, rows], rows, "simulated")
    quantized = solution.quantized(problem, rows, candidate.weight.dtype)
    layer = SparseMarlinLinear.from_codes(
        quantized.codes,
        quantized.scales,
        linear.bias,
        group_size=quantized.group_size,
        num_bits=quantized.num_bits,
        correction=correction,
    ).train(linear.training)
    aim, effective = problem.target[:, rows].t(), layer.to_linear().weight
    error = output_error(aim, effective, problem.hessian.exact)
    return Replacement(layer, relative_error(candidate.weight, quantized), error)


def _dense(candidate: Candidate, problem: Problem, values: torch.Tensor, rows: slice, reason: str) -> Replacement:
    """A dense layer with `values` [K, R], for the `rows` of the problem."""
    linear = candidate.module
    assert isinstance(linear, nn.Linear)
    weight = candidate.weight
    new = values.t().to(weight.dtype)
    lost = float((weight.float() - new.float()).norm() / weight.float().norm().clamp_min(1e-30))
    error = output_error(problem.target[:, rows].t(), new, problem.hessian.exact)
    return Replacement(dense_twin(linear, new), lost, error, reason)


def _exchange(candidate: Candidate, new: Replacement | str) -> None:
    """Let the block compute with what the linear becomes, until `_lent` ends."""
    if isinstance(new, str):
        return
    dense = new.layer.to_linear() if isinstance(new.layer, SparseMarlinLinear) else new.layer
    assert isinstance(candidate.module, nn.Linear)
    assert isinstance(dense, nn.Linear)
    parameter = candidate.module.weight
    parameter.data = dense.weight.detach().to(device=parameter.device, dtype=parameter.dtype)


def _line(candidate: Candidate, new: Replacement | str, seconds: float) -> str:
    if isinstance(new, str):
        return f"{candidate.name}: stays dense: {new}"
    text = f"{candidate.name}: output error {new.output_error:.4f} ({seconds:.1f} s)"
    return text if new.reason is None else f"{text}; stays dense: {new.reason}"


@contextlib.contextmanager
def _lent(module: nn.Module, device: torch.device) -> Iterator[None]:
    """The module on `device`; afterwards its parameters and buffers are the tensors that they were before."""
    tensors = [*module.parameters(), *module.buffers()]
    before = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(device)
        yield
    finally:
        for tensor, data in zip(tensors, before, strict=True):
            tensor.data = data


def _moved(call: Call, device: torch.device) -> Call:
    def move(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(device)
        if isinstance(value, (tuple, list)):
            return type(value)(move(item) for item in value)
        return value

    return Call(tuple(move(value) for value in call.args), {key: move(value) for key, value in call.kwargs.items()})
