"""A model as a chain of blocks: which modules they are, what the first one is fed, which linears of a block share an
input.

The model's own forward decides all of it. Its blocks are replaced for a moment by recorders that note their arguments
and hand the hidden states on, so masks and position embeddings are what the model makes of the tokens, block by block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..replace import Candidate


@dataclass
class Block:
    """A module that is compressed as a whole, and the linears in it that are to be converted."""

    name: str
    module: nn.Module
    linears: list[Candidate]


@dataclass
class Call:
    """What a block is called with beside the hidden states."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class Ending:
    """A child of a block that is called once and returns what one of its linears returns: attention ends with its
    output projection, an MLP with the down projection."""

    child: nn.Module
    rest: tuple[None, ...] | None  # what follows in the tuple that it returns; None: it returns the tensor

    def output(self, tensor: torch.Tensor) -> Any:
        return tensor if self.rest is None else (tensor, *self.rest)


@dataclass
class Group:
    """Linears with the same input, how often a forward of the block calls the first of them, and what it ends."""

    linears: list[Candidate]
    calls: int
    ending: Ending | None = None


class _Stop(Exception):  # noqa: N818  (ends a forward, no error)
    """Nothing after this point of the forward is needed."""


def find_blocks(model: nn.Module, chosen: Sequence[Candidate]) -> tuple[list[Block], dict[str, str]]:
    """The blocks in their order, and why linears that are in none of them stay dense.

    The blocks are the children of the `nn.ModuleList` with the most linears to convert; a model without one is a
    single block.
    """
    best, members = None, 0
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            inside = sum(candidate.name.startswith(f"{name}.") for candidate in chosen)
            if inside > members:
                best, members = (name, module), inside
    if best is None or 2 * members <= len(chosen):
        return [Block("", model, list(chosen))], {}
    name, modules = best
    reasons: dict[str, str] = {}
    blocks: list[Block] = []
    seen: dict[int, str] = {}
    for index, module in enumerate(modules):
        path = f"{name}.{index}"
        linears = [candidate for candidate in chosen if candidate.name.startswith(f"{path}.")]
        if id(module) in seen:
            first = seen[id(module)]
            reasons.update({c.name: f"its block {first} is used again as {path}" for c in chosen if _in(c, first)})
        seen.setdefault(id(module), path)
        blocks.append(Block(path, module, linears))
    inside_names = {candidate.name for block in blocks for candidate in block.linears}
    for candidate in chosen:
        if candidate.name not in inside_names:
            reasons.setdefault(candidate.name, f"outside the blocks {name}.0 to {name}.{len(modules) - 1}")
    for block in blocks:
        block.linears = [candidate for candidate in block.linears if candidate.name not in reasons]
    return blocks, reasons


def _in(candidate: Candidate, path: str) -> bool:
    return candidate.name.startswith(f"{path}.")


def run_model(model: nn.Module, tokens: torch.Tensor) -> Any:
    """The model's forward on token ids [B, L], without a key-value cache where it could have one."""
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "use_cache"):
        return model(input_ids=tokens, use_cache=False)
    return model(tokens)


def run_block(module: nn.Module, hidden: torch.Tensor, call: Call) -> torch.Tensor:
    """The block's output hidden states."""
    out = module(hidden, *call.args, **call.kwargs)
    return out[0] if isinstance(out, (tuple, list)) else out


@torch.no_grad()
def block_inputs(
    model: nn.Module, blocks: Sequence[Block], batches: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], list[list[Call]]]:
    """Hidden states before the first block, a tensor for each batch, and `calls[block][batch]`.

    Equal arguments are kept once, so that memory does not grow with batches and blocks.
    """
    if len(blocks) == 1 and blocks[0].module is model:
        kwargs = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
        return list(batches), [[Call(kwargs=dict(kwargs)) for _ in batches]]
    hidden: list[torch.Tensor] = []
    calls: list[list[Call]] = [[] for _ in blocks]
    keep = _Keeper()
    as_tuple = _returns_tuple(model, blocks[0].module, batches[0][:1, : min(8, batches[0].shape[1])])

    def recorder(index: int) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            states, args, kwargs = _split(args, kwargs)
            if index == 0:
                hidden.append(states)
            calls[index].append(Call(tuple(keep(value) for value in args), {k: keep(v) for k, v in kwargs.items()}))
            if index == len(blocks) - 1:
                raise _Stop
            return (states,) if as_tuple else states

        return record

    with _forwards({block.module: recorder(index) for index, block in enumerate(blocks)}):
        device = next(model.parameters()).device
        for batch in batches:
            with contextlib.suppress(_Stop):
                run_model(model, batch.to(device))
    if any(len(of_block) != len(batches) for of_block in calls):
        raise ValueError(
            f"compress: model: expected a forward that calls {blocks[0].name} to {blocks[-1].name} once each, "
            f"got {[len(of_block) for of_block in calls]} calls for {len(batches)} batches"
        )
    return hidden, calls


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]:
    if args:
        return args[0], args[1:], kwargs
    return kwargs["hidden_states"], (), {key: value for key, value in kwargs.items() if key != "hidden_states"}


def _returns_tuple(model: nn.Module, first: nn.Module, tokens: torch.Tensor) -> bool:
    """Whether blocks return a tuple, as the model expects to be answered by the recorders."""
    real = first.forward
    found: list[bool] = []

    def probe(*args: Any, **kwargs: Any) -> Any:
        found.append(isinstance(real(*args, **kwargs), (tuple, list)))
        raise _Stop

    with _forwards({first: probe}), contextlib.suppress(_Stop):
        run_model(model, tokens.to(next(model.parameters()).device))
    if not found:
        raise ValueError("compress: model: expected a forward that calls its blocks, got one that does not")
    return found[0]


class _Keeper:
    """Replaces a tensor, or tensors in tuples, by an equal one seen before."""

    def __init__(self) -> None:
        self._seen: list[torch.Tensor] = []

    def __call__(self, value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(self(item) for item in value)
        if not isinstance(value, torch.Tensor):
            return value
        for old in self._seen:
            if old.shape == value.shape and old.dtype == value.dtype and torch.equal(old, value):
                return old
        self._seen.append(value)
        return value


@contextlib.contextmanager
def _forwards(replacements: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Instance forwards in place of the classes', for a moment."""
    previous = {module: vars(module).get("forward") for module in replacements}
    try:
        for module, forward in replacements.items():
            module.forward = forward
        yield
    finally:
        for module, old in previous.items():
            if old is None:
                vars(module).pop("forward", None)
            else:
                module.forward = old


@torch.no_grad()
def shared_inputs(block: Block, hidden: torch.Tensor, call: Call) -> list[Group]:
    """The block's linears grouped by input, in the order of their first call."""
    order: list[tuple[torch.Tensor, list[Candidate]]] = []
    calls: dict[str, int] = {}

    def note(candidate: Candidate) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[candidate.name] = calls.get(candidate.name, 0) + 1
            if calls[candidate.name] > 1:
                return
            inputs = args[0] if args else kwargs["input"]
            # The tensors are kept until the end of the pass, so that no two of them share an identity.
            for seen, members in order:
                if seen is inputs:
                    members.append(candidate)
                    return
            order.append((inputs, [candidate]))

        return hook

    returned: dict[nn.Module, list[Any]] = {}  # by linears and children

    def note_output(module: nn.Module, _: Any, output: Any) -> None:
        returned.setdefault(module, []).append(output)

    handles = [c.module.register_forward_pre_hook(note(c), with_kwargs=True) for c in block.linears]
    children = [child for child in block.module.children() if not isinstance(child, nn.Linear)]
    handles += [m.register_forward_hook(note_output) for m in (*children, *(c.module for c in block.linears))]
    try:
        run_block(block.module, hidden, call)
    finally:
        for handle in handles:
            handle.remove()
    groups: list[Group] = []
    for _, members in order:
        # A linear that is called again with another input needs sums of its own.
        again = [candidate for candidate in members if calls[candidate.name] > 1]
        once = [candidate for candidate in members if calls[candidate.name] == 1]
        groups += [Group(once, 1, _ending(once, children, returned))] if once else []
        groups += [Group([candidate], calls[candidate.name]) for candidate in again]
    never = [candidate for candidate in block.linears if candidate.name not in calls]
    # Experts that the first sequence did not choose: looked for in all sequences, each for itself.
    return groups + [Group([candidate], 0) for candidate in never]


def _ending(
    linears: list[Candidate], children: list[nn.Module], returned: Mapping[nn.Module, list[Any]]
) -> Ending | None:
    if len(linears) > 1:
        return None
    last = returned[linears[0].module][0]
    for child in children:
        outputs = returned.get(child, [])
        if len(outputs) != 1:
            continue
        if outputs[0] is last:
            return Ending(child, None)
        if isinstance(outputs[0], tuple) and outputs[0] and outputs[0][0] is last:
            rest = outputs[0][1:]
            return Ending(child, rest) if all(other is None for other in rest) else None
    return None


class GroupHook:
    """Feeds the inputs of a group's first linear to `consume` and ends the forward once all its calls were seen."""

    def __init__(self, group: Group, consume: Callable[[torch.Tensor], None]) -> None:
        self._group, self._consume, self._left = group, consume, group.calls
        self._handle = group.linears[0].module.register_forward_pre_hook(self._seen, with_kwargs=True)

    def _seen(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._consume(args[0] if args else kwargs["input"])
        self._left -= 1
        if self._left == 0:
            raise _Stop

    def run(self, module: nn.Module, hidden: torch.Tensor, call: Call) -> None:
        self._left = self._group.calls
        with contextlib.suppress(_Stop):
            run_block(module, hidden, call)

    def remove(self) -> None:
        self._handle.remove()


class FinishedParts:
    """Outputs of a block's children that will not change any more, kept so that later passes do not compute them again.

    A child is finished when all linears in it are compressed. Where its last linear decides what it returns, the pass
    that collected that linear's inputs has done all of its other work already: from these inputs, kept up to a limit of
    bytes, the output follows by one product. Else what the child returned for a batch in the next pass is handed out in
    the passes after that; what is larger than its inputs (attention maps) is not kept. What is kept has a `limit`.
    """

    def __init__(self, block: Block, limit: int) -> None:
        self._children = [
            (child, {c.name for c in block.linears if any(m is c.module for m in child.modules())})
            for child in block.module.children()
        ]
        self._left = limit  # bytes that may still be kept
        self._endings: dict[nn.Module, Group] = {}
        self._inputs: dict[nn.Module, dict[int, torch.Tensor]] = {}  # of last linears: by child and batch
        self._outputs: dict[nn.Module, dict[int, torch.Tensor]] = {}  # of the same
        self._kept: dict[nn.Module, dict[tuple[int, int], Any]] = {}  # by batch and call in it
        self._calls: dict[nn.Module, int] = {}
        self._batch = 0
        self._again = True
        self._patched = contextlib.ExitStack()

    def keep_inputs(self, group: Group, inputs: torch.Tensor) -> None:
        """The inputs of a group that ends a child, in this batch."""
        self._keep(self._inputs, group, inputs)

    def keep_output(self, group: Group, output: torch.Tensor) -> None:
        """What the linear that ends a child returns, in this batch, where that is known already."""
        self._keep(self._outputs, group, output)

    def _keep(self, kept: dict[nn.Module, dict[int, torch.Tensor]], group: Group, value: torch.Tensor) -> None:
        size = _nbytes(value)
        if group.ending is not None and size <= self._left:
            self._left -= size
            self._endings[group.ending.child] = group
            kept.setdefault(group.ending.child, {})[self._batch] = value

    def finish(self, done: set[str], *, again: bool) -> None:
        """`done` linears are compressed: from the next pass on keep what their children return, if there are passes
        `again` after that one."""
        self._again = again
        for child, names in self._children:
            if names and names <= done and child not in self._kept and not isinstance(child, nn.Linear):
                self._kept[child] = {}
                self._patched.enter_context(_forwards({child: self._wrap(child)}))

    def batch(self, index: int) -> None:
        """The next forward is of this batch."""
        self._batch = index
        self._calls.clear()

    def close(self) -> None:
        self._patched.close()
        self._kept.clear()
        self._inputs.clear()
        self._outputs.clear()

    def _wrap(self, child: nn.Module) -> Callable[..., Any]:
        real = child.forward
        kept, group = self._kept[child], self._endings.get(child)
        inputs, outputs = self._inputs.get(child, {}), self._outputs.get(child, {})

        def forward(*args: Any, **kwargs: Any) -> Any:
            key = (self._batch, self._calls.get(child, 0))
            self._calls[child] = key[1] + 1
            if key in kept:
                return kept[key]
            known = self._batch in outputs
            if group is not None and group.ending is not None and (known or self._batch in inputs):
                last = (outputs if known else inputs).pop(self._batch)
                self._left += _nbytes(last)
                out = group.ending.output(last if known else group.linears[0].module(last))
            else:
                out = real(*args, **kwargs)
            size = _nbytes(out)
            small = size <= 2 * sum(_nbytes(value) for value in (*args, *kwargs.values()))
            if self._again and small and size <= self._left:
                self._left -= size
                kept[key] = out
            return out

        return forward


def _nbytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, (tuple, list)):
        return sum(_nbytes(item) for item in value)
    return 0
