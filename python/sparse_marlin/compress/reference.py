"""The dense model beside the compressed one: what a layer should return although its inputs are not the dense ones.

A layer of the compressed model is given X^, which carries the errors of the layers before it. Fitting W X^ leaves these
errors as they are; fitting W X, what the dense layer returns, makes good a part of them (the asymmetric objective of
GPTAQ, arXiv 2504.02692). Completing the square, `||V X^ - W X||^2` is the objective that all solvers minimize, with
H = X^ X^^T and another target:

    W' = W + share * W (X - X^) X^^T H^-1

H is damped as elsewhere. A share of less than one is what fits other text, too: a part of the gap is noise of the
calibration text (docs/ACCURACY.md).
"""

from __future__ import annotations

import copy
import dataclasses

import torch

from .blocks import Block, Call, Ending, FinishedParts, Group, GroupHook, run_block
from .hessian import Hessian, product_of_tokens


class Reference:
    """A dense copy of a block, made before its weights are exchanged, and the inputs of its linears."""

    def __init__(self, block: Block, limit: int) -> None:
        module = copy.deepcopy(block.module)
        prefix = f"{block.name}." if block.name else ""
        self._twins = {
            c.name: dataclasses.replace(c, module=module.get_submodule(c.name.removeprefix(prefix)))
            for c in block.linears
        }
        children = dict(module.named_children())
        self._children = {child: children[name] for name, child in block.module.named_children()}
        self.block = Block(block.name, module, list(self._twins.values()))
        self._parts = FinishedParts(self.block, limit)

    def inputs(self, group: Group) -> ReferenceInputs:
        """What the dense linears like those of `group` are given, batch by batch."""
        ending = group.ending and Ending(self._children[group.ending.child], group.ending.rest)
        return ReferenceInputs(self, Group([self._twins[c.name] for c in group.linears], group.calls, ending))

    def finish(self, done: set[str], *, again: bool) -> None:
        self._parts.finish(done, again=again)

    def output(self, number: int, hidden: torch.Tensor, call: Call) -> torch.Tensor:
        self._parts.batch(number)
        return run_block(self.block.module, hidden, call)

    def close(self) -> None:
        self._parts.close()


class ReferenceInputs:
    """The running mean over the tokens of x^ x^T, for x^ of the compressed block and x of the dense one.

    A target needs its product with the dense weight alone, x^ (W x)^T. Where W has fewer rows than columns and W x is
    computed anyway, that is the smaller product. (In 16 bits W x is rounded, x is not.)
    """

    def __init__(self, reference: Reference, group: Group) -> None:
        self._parts, self._module, self._group = reference._parts, reference.block.module, group
        self._seen: torch.Tensor | None = None
        self._sum: torch.Tensor | None = None
        self._tokens = 0
        self._comparable = True
        weight = group.linears[0].weight
        self._of_outputs = (
            group.ending is not None and weight.shape[0] < weight.shape[1] and weight.dtype == torch.float32
        )
        self._hook = GroupHook(group, self._take)

    def _take(self, inputs: torch.Tensor) -> None:
        if not self._of_outputs:
            self._seen = inputs
            self._parts.keep_inputs(self._group, inputs)
            return
        linear = self._group.linears[0].module
        assert isinstance(linear, torch.nn.Linear)
        self._seen = torch.nn.functional.linear(inputs, linear.weight)
        self._parts.keep_output(self._group, self._seen if linear.bias is None else self._seen + linear.bias)

    def add(self, number: int, hidden: torch.Tensor, call: Call, seen: list[torch.Tensor]) -> None:
        """`seen` is what the compressed block's linears were given for batch `number`: one tensor, or nothing."""
        if not self._comparable:
            return
        self._parts.batch(number)
        self._hook.run(self._module, hidden, call)
        dense, self._seen = self._seen, None
        # Tokens that are routed otherwise than in the compressed model (experts) have nothing to be compared with.
        if dense is None or not seen or dense.shape[:-1] != seen[0].shape[:-1] or dense.shape[:2] != hidden.shape[:2]:
            self._comparable, self._sum = False, None
            return
        rows, others = (tensor.detach().reshape(-1, tensor.shape[-1]) for tensor in (seen[0], dense))
        total = self._tokens + rows.shape[0]
        products = product_of_tokens(rows, others).div_(total)
        self._sum = products if self._sum is None else products.add_(self._sum, alpha=self._tokens / total)
        self._tokens = total

    def gap(self, hessian: Hessian) -> Gap | None:
        """None where the two models' tokens cannot be compared."""
        if self._sum is None:
            return None
        return Gap(self._sum, True) if self._of_outputs else Gap(self._sum.sub_(hessian.exact), False)

    def remove(self) -> None:
        self._hook.remove()


@dataclasses.dataclass
class Gap:
    """What the compressed model's inputs lack: the mean of x^ (x - x^)^T [K, K], or that of x^ (W x)^T [K, R]."""

    mean: torch.Tensor
    of_outputs: bool

    def times(self, target: torch.Tensor, hessian: Hessian) -> torch.Tensor:
        """The mean of x^ (x - x^)^T W^T for the dense weights `target` = W^T."""
        return self.mean - hessian.exact @ target if self.of_outputs else self.mean @ target


def followed(target: torch.Tensor, hessian: Hessian, gap: Gap, share: float) -> torch.Tensor:
    """The target [K, R] that makes good `share` of what the inputs lack, for the dense weights `target`."""
    return torch.add(target, torch.cholesky_solve(gap.times(target, hessian), hessian.lower), alpha=share)
