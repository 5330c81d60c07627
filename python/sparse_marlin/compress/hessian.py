"""The second moment of a layer's inputs, H = X X^T / tokens: accumulated over batches, damped, factored.

Every solver minimizes `sum over rows r of (w_r - v_r)^T H (w_r - v_r)`, the squared error of the layer's outputs on the
calibration tokens. Linears that read the same input share one H. All of it is float32: sums are kept as running means,
so that their size does not grow with the number of tokens.
"""

from __future__ import annotations

import torch

DAMPING = 0.01  # fraction of the mean diagonal that is added to the diagonal (SparseGPT, GPTQ)
_DAMPING_LADDER = (1.0, 10.0, 100.0)  # tried in turn when the matrix is not positive definite in float32
_BLOCKS = 4  # H is symmetric: 4 x 4 blocks, of which the 10 at or below the diagonal are computed
_BLOCK_ON_CPU = 200  # at most so wide: there smaller blocks are as fast, and less is computed twice


class HessianAccumulator:
    """Running mean of x x^T over the tokens seen. `name` is the layer that errors speak of."""

    def __init__(self, size_k: int, device: torch.device, name: str) -> None:
        self.name = name
        self.tokens = 0
        self._sum = torch.zeros((size_k, size_k), dtype=torch.float32, device=device)

    def add(self, inputs: torch.Tensor) -> None:
        """`inputs` [..., K] in any floating dtype."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).to(self._sum.device)
        count = rows.shape[0]
        if count == 0:
            return
        total = self.tokens + count
        size_k = rows.shape[1]
        step = -(-size_k // _BLOCKS)
        if rows.device.type == "cpu":
            step = min(step, _BLOCK_ON_CPU)
        rows = rows if _exact(rows) else rows.float()
        for start in range(0, size_k, step):
            end = min(start + step, size_k)
            left, right, part = rows[:, start:end], rows[:, :end], self._sum[start:end, :end]
            if _exact(rows):
                part.mul_(self.tokens / total).add_(product_of_tokens(left, right), alpha=1 / total)
            else:
                part.addmm_(left.t(), right, beta=self.tokens / total, alpha=1 / total)
        self.tokens = total

    def finish(self) -> torch.Tensor:
        """H [K, K], symmetric. ValueError that names the layer if no token came or an input was NaN or infinite."""
        if self.tokens == 0:
            raise ValueError(f"{self.name}: calibration: expected tokens that reach this layer, got none")
        lower = self._sum.tril()
        hessian = lower + lower.tril(-1).t()
        finite = torch.isfinite(hessian.diagonal())
        if not bool(finite.all()):
            feature = int(torch.argmin(finite.to(torch.int8)))
            raise ValueError(
                f"{self.name}: activations: expected finite inputs, got NaN or infinity at input feature {feature}; "
                "the model overflows its dtype (try bfloat16 or float32) or a weight before this layer is damaged"
            )
        return hessian


def product_of_tokens(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The sum over tokens of l r^T, float32, for [T, K] and [T, L] of one dtype."""
    if _exact(left):
        return torch.mm(left.t(), right, out_dtype=torch.float32)
    return left.float().t() @ right.float()


def _exact(rows: torch.Tensor) -> bool:
    """Whether tensor cores do it: products of 16-bit values exactly, sums in float32, several times faster."""
    return rows.is_cuda and rows.dtype in (torch.float16, torch.bfloat16)


class Hessian:
    """H of one group of linears as the solvers need it: dead inputs handled, damped, positive definite in float32.

    `damped` [K, K] is H with 1 on the diagonal of inputs that were always zero and `damping` times the mean diagonal
    added; `exact` is H itself, for reporting errors.
    """

    def __init__(self, hessian: torch.Tensor, damping: float = DAMPING) -> None:
        diagonal = hessian.diagonal()
        self.exact = hessian
        self.dead = diagonal <= 0
        mean = float(diagonal[~self.dead].mean()) if not bool(self.dead.all()) else 1.0
        repaired = torch.where(self.dead, torch.full_like(diagonal, mean), diagonal)
        for factor in _DAMPING_LADDER:
            self.damping = damping * factor
            damped = hessian.clone()
            damped.diagonal().copy_(repaired + self.damping * mean)
            factored, failed = torch.linalg.cholesky_ex(damped)
            if not bool(failed) and bool(torch.isfinite(factored.diagonal()).all()):
                self.damped = damped
                self._lower = factored
                return
        raise ValueError(
            "hessian: expected a matrix that is positive definite with damping up to "
            f"{damping * _DAMPING_LADDER[-1]:g} of its mean diagonal, got one that is not; use more calibration text"
        )

    @property
    def diagonal(self) -> torch.Tensor:
        return self.damped.diagonal()

    @property
    def lower(self) -> torch.Tensor:
        """L with L L^T = damped."""
        return self._lower

    def inverse_upper(self) -> torch.Tensor:
        """U, upper triangular, with U^T U = damped^-1. U_jj^2 is the j-th diagonal element of the inverse of
        `damped[j:, j:]`: the loss of removing weight j, when the ones before it are settled, is w_j^2 / (2 U_jj^2)."""
        inverse = torch.cholesky_inverse(self._lower)
        # The factor of an inverse: rounding can make it indefinite where `damped` is not.
        for shift in (0.0, 1e-6, 1e-4):
            shifted = inverse + shift * inverse.diagonal().mean() * torch.eye(
                len(inverse), dtype=inverse.dtype, device=inverse.device
            )
            upper, failed = torch.linalg.cholesky_ex(shifted, upper=True)
            if not bool(failed):
                return upper
        raise ValueError("hessian: expected an inverse that is positive definite in float32; use more calibration text")


def output_error(weight: torch.Tensor, approximate: torch.Tensor, hessian: torch.Tensor) -> float:
    """||(W - V) X||_F / ||W X||_F for weights [N, K] and H = X X^T."""
    lost = energy = 0.0
    rows = max(1, (1 << 24) // max(weight.shape[1], 1))
    for start in range(0, weight.shape[0], rows):
        exact = weight[start : start + rows].float()
        left = exact - approximate[start : start + rows].float()
        lost += float(((left @ hessian) * left).double().sum())
        energy += float(((exact @ hessian) * exact).double().sum())
    return (max(lost, 0.0) / energy) ** 0.5 if energy > 0 else 0.0
