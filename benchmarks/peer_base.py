"""What every peer is made of, and how the benchmarks go on where one fails; peers.py has the list of them."""

import sys
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from summary import PEERS
from timing import copies

CHECKED_TOKENS, CHECKED_FEATURES = 64, 256

Call = Callable[[int], torch.Tensor]
Made = TypeVar("Made")


class UnsupportedError(Exception):
    """Why a peer has no number here."""


class ContextLostError(RuntimeError):
    """An error after which CUDA answers nothing more in this process."""


@dataclass
class Weight:
    """What peers are built from."""

    dense: torch.Tensor  # [N, K]
    group_size: int

    @property
    def n(self) -> int:
        return self.dense.shape[0]

    @property
    def k(self) -> int:
        return self.dense.shape[1]


class Peer(ABC):
    tolerance: float  # of the Frobenius norm of what is compared, relative
    note = ""  # how the last prepared call is made, where there is a choice

    @abstractmethod
    def prepare(self, a: torch.Tensor) -> Call:
        """call(i) multiplies by the i-th of the rotated weights; [M, N], possibly with more rows than `a` has."""

    @abstractmethod
    def reference(self, a: torch.Tensor) -> torch.Tensor:
        """The first features for `a`, float32."""

    def check(self, a: torch.Tensor, call: Call) -> None:
        rows = min(CHECKED_TOKENS, a.shape[0])
        wanted = self.reference(a[:rows])
        error = (call(0)[:rows, : wanted.shape[1]].float() - wanted).norm() / wanted.norm()
        if not bool(error <= self.tolerance):  # NaN, too
            raise UnsupportedError(f"wrong result: {float(error):.1e} from the product in float32")


def rotated(weight: torch.Tensor) -> list[torch.Tensor]:
    """The same values at as many places as keep every cache cold."""
    return [weight] + [weight.clone() for _ in range(copies(weight.numel() * weight.element_size()) - 1)]


class LeftOut:
    """What has no number, by peer and reason: where."""

    def __init__(self) -> None:
        self.reasons: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))

    def add(self, name: str, where: str, reason: object) -> None:
        text = (str(reason).strip() or type(reason).__name__).splitlines()[0][:200]
        if text not in self.reasons[name]:
            print(f"{PEERS.get(name, name)}, {where}: left out: {text}", file=sys.stderr)
        self.reasons[name][text].append(where)

    def attempt(self, name: str, where: str, work: Callable[..., Made], *args: object) -> Made | None:
        """What the work returns for the arguments; None where it fails, which must not end the run."""
        try:
            done = work(*args)
            torch.cuda.synchronize()
            return done
        except (UnsupportedError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            self.add(name, where, error)
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise ContextLostError(f"{PEERS.get(name, name)}, {where}: {error}") from error
        return None
