"""Peers from shared libraries: the public Marlin kernels, dense and sparse, built as they are published.

The dense one has an L2 hint (`cp_async4_stream`) that is an illegal instruction on compute capability 9.0; there it is
built with a plain `cp.async` instead. For instance: nvcc -O3 -std=c++17 --expt-relaxed-constexpr -arch=sm_90 -shared
-Xcompiler -fPIC marlin_cuda_kernel.cu -o libmarlin.so
"""

import ctypes

import torch
from peer_base import Call, Peer, UnsupportedError, Weight, rotated

from sparse_marlin import _core

DRAWN_ROWS = 2048  # metadata is drawn for so many features and repeated


class Marlin(Peer):
    """The public dense Marlin kernel, from a shared library. Random codes; checked with constant ones, whose layout is
    the same in any order."""

    tolerance = 0.02
    SYMBOL = "_Z11marlin_cudaPKvS0_PvS1_iiiS1_iiP11CUstream_stiiii"
    SPARSE = False
    CODE, OFFSET = 11, 8
    MAX_PARALLEL = 16

    def __init__(self, weight: Weight, library: ctypes.CDLL) -> None:
        n, k = weight.n, weight.k
        if n % 256 or k % 128:
            raise UnsupportedError("N a multiple of 256 and K of 128 only")
        self.n, self.k, self.group_size = n, k, weight.group_size
        device, dtype = weight.dense.device, weight.dense.dtype
        pointer, number = ctypes.c_void_p, ctypes.c_int
        self.kernel = library[self.SYMBOL]
        self.kernel.restype = number
        self.kernel.argtypes = [
            *[pointer] * (5 if self.SPARSE else 4), *[number] * 3, pointer, number, number, pointer, *[number] * 4,
        ]  # fmt: skip
        self.scale = 1 / (8 * k**0.5)
        self.locks = torch.zeros(n // 128 * self.MAX_PARALLEL, dtype=torch.int32, device=device)
        self.shape = (k // 32, 2 * n) if self.SPARSE else (k // 16, 2 * n)
        self.codes = rotated(torch.randint(-(2**31), 2**31, self.shape, dtype=torch.int32, device=device))
        self.meta = rotated(self.random_meta(device))[: len(self.codes)] if self.SPARSE else []
        groups = _core.num_groups(k, self.group_size)
        self.scales = torch.full((len(self.codes), groups, n), self.scale, device=device, dtype=dtype).unbind()

    def random_meta(self, device: torch.device) -> torch.Tensor:
        """int16 [N, K / 16]; a nibble is a pair of positions, the first one low."""
        pairs = torch.tensor([4, 8, 12, 9, 13, 14], device=device)
        nibbles = pairs[torch.randint(0, len(pairs), (min(self.n, DRAWN_ROWS), self.k // 16, 4), device=device)]
        words = sum(nibbles[..., i] << (4 * i) for i in range(4))
        drawn = torch.where(words >= 2**15, words - 2**16, words).short()
        return drawn.repeat(-(-self.n // drawn.shape[0]), 1)[: self.n].contiguous()

    def launch(
        self, a: torch.Tensor, out: torch.Tensor, codes: torch.Tensor, meta: torch.Tensor | None, scales: torch.Tensor
    ) -> None:
        tokens = a.shape[0]
        tensors = [a, codes, *([] if meta is None else [meta]), out, scales]
        sizes = (self.n, tokens, self.k) if self.SPARSE else (tokens, self.n, self.k)
        group = self.group_size if self.group_size < 0 else self.group_size // (2 if self.SPARSE else 1)
        stream = torch.cuda.current_stream().cuda_stream
        status = self.kernel(
            *(t.data_ptr() for t in tensors), *sizes, self.locks.data_ptr(), group, a.get_device(), stream,
            -1, -1, -1, self.MAX_PARALLEL,
        )  # fmt: skip
        if status != 0:
            raise UnsupportedError(f"its status {status}")

    def prepare(self, a: torch.Tensor) -> Call:
        out = torch.empty(a.shape[0], self.n, device=a.device, dtype=a.dtype)

        def call(i: int) -> torch.Tensor:
            place = i % len(self.codes)
            meta = self.meta[i % len(self.meta)] if self.meta else None
            self.launch(a, out, self.codes[place], meta, self.scales[place])
            return out

        return call

    def reference(self, a: torch.Tensor) -> torch.Tensor:
        """Of constant codes: those of a sparse weight stand at the first two of every four columns."""
        read = a.float().view(a.shape[0], -1, 4)[..., : 2 if self.SPARSE else 4]
        return (read.sum(dim=(1, 2)) * (self.CODE - self.OFFSET) * self.scale)[:, None].expand(-1, self.n)

    def check(self, a: torch.Tensor, call: Call) -> None:
        a = a.abs()  # sums that do not cancel
        word = int.from_bytes(bytes([self.CODE << 4 | self.CODE]) * 4, "little", signed=True)
        codes = torch.full(self.shape, word, dtype=torch.int32, device=a.device)
        meta = torch.full((self.n, self.k // 16), 0x4444, dtype=torch.int16, device=a.device) if self.SPARSE else None
        out = torch.full((a.shape[0], self.n), float("nan"), device=a.device, dtype=a.dtype)
        self.launch(a, out, codes, meta, self.scales[0])
        super().check(a, lambda _: out)
        call(0)


class SparseMarlin(Marlin):
    """The public Sparse-Marlin kernel, from a shared library."""

    SYMBOL = "_ZN6marlin15marlin_cuda_2_4EPKvS1_S1_PvS2_iiiS2_iiP11CUstream_stiiii"
    SPARSE = True
