"""Peers that torch brings: cuSPARSELt's 2:4 sparsity, 4-bit weights, fp8."""

import statistics
import time

import torch
from peer_base import CHECKED_FEATURES, Call, Peer, UnsupportedError, Weight, rotated
from timing import Recorder

DRAWN_ROWS = 2048  # patterns of zeros are drawn for so many features and repeated
FP8 = torch.float8_e4m3fn
DEFAULT = (0, 1, -1)  # cuSPARSELt's algorithm, split along K and mode of the split


def prune_24(values: torch.Tensor, rows: int = DRAWN_ROWS) -> torch.Tensor:
    """Sets two of every four values along the last dimension to zero, in place; the pattern repeats after `rows`."""
    pairs = torch.tensor(
        [[i in pair for i in range(4)] for pair in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))],
        device=values.device,
    )
    n, quads = values.shape[0], values.shape[1] // 4
    rows = min(rows, n)
    zeros = pairs[torch.randint(0, len(pairs), (rows, quads), device=values.device)].view(rows, quads * 4)
    for start in range(0, n, rows):
        part = values[start : start + rows]
        part.masked_fill_(zeros[: part.shape[0]], 0)
    return values


class CuSparseLt(Peer):
    """float16 or bfloat16 weights with 2:4 sparsity, through torch.

    Tokens are padded to a multiple of 8 beforehand, as torch does. Of its own default algorithm, written as [M, N] and
    as [N, M], and of the one that its search finds for [M, N], the fastest counts. The search runs every algorithm
    several times: it is left out where that would take longer than `search_s`.
    """

    tolerance = 0.01
    TOKENS = 8
    PROBES = 4
    searched_runs = 400.0  # multiplications a search, about; corrected by what the last one took

    def __init__(
        self, pruned: torch.Tensor, recorder: Recorder, search_s: float, weights: list[torch.Tensor] | None = None
    ) -> None:
        """`pruned` has 2:4 sparsity already; `weights` are what is rotated, compressed, where the caller has them."""
        self.recorder, self.search_s = recorder, search_s
        self.head = pruned[:CHECKED_FEATURES].float()
        self.weights = weights or rotated(torch._cslt_compress(pruned))

    def reference(self, a: torch.Tensor) -> torch.Tensor:
        return a.float() @ self.head.t()

    def call(self, acts: torch.Tensor, transposed: bool, algorithm: tuple[int, int, int]) -> Call:
        alg_id, split_k, split_k_mode = algorithm

        def call(i: int) -> torch.Tensor:
            out = torch._cslt_sparse_mm(
                self.weights[i % len(self.weights)], acts.t(), transpose_result=transposed,
                alg_id=alg_id, split_k=split_k, split_k_mode=split_k_mode,
            )  # fmt: skip
            return out if transposed else out.t()

        return call

    def prepare(self, a: torch.Tensor) -> Call:
        padding = -a.shape[0] % self.TOKENS
        acts = torch.nn.functional.pad(a, (0, 0, 0, padding)) if padding else a
        with torch.cuda.stream(self.recorder.stream):
            variants = self.working(
                {"default": self.call(acts, True, DEFAULT), "default, [N, M]": self.call(acts, False, DEFAULT)}
            )
            seconds = self.probe(next(iter(variants.values())))
            if seconds * CuSparseLt.searched_runs > self.search_s:
                searched = ", no search"
            else:
                found, searched = self.search(acts, seconds)
                variants |= found
            chosen = self.fastest(variants) if len(variants) > 1 else next(iter(variants))
        self.note = chosen + searched + (f", M padded by {padding}" if padding else "")
        return variants[chosen]

    @staticmethod
    def working(variants: dict[str, Call]) -> dict[str, Call]:
        """Those that it does not refuse, at least one."""
        found, refusal = {}, ""
        for name, call in variants.items():
            try:
                call(0)
                found[name] = call
            except RuntimeError as error:
                refusal = str(error)
        if not found:
            raise UnsupportedError(refusal)
        return found

    def search(self, acts: torch.Tensor, seconds: float) -> tuple[dict[str, Call], str]:
        """The algorithm that cuSPARSELt's own search prefers, unless it is the default one or fails, and what to note;
        `seconds` is the time of one call."""
        start = time.perf_counter()
        try:
            alg_id, split_k, split_k_mode, most = torch._C._cusparselt.mm_search(
                self.weights[0], acts.t(), None, None, None, True
            )
            torch.cuda.synchronize()
            CuSparseLt.searched_runs = (time.perf_counter() - start) / seconds
            algorithm = (int(alg_id), int(split_k), int(split_k_mode))
            if algorithm[:2] == DEFAULT[:2]:
                return {}, ""
            name = f"algorithm {alg_id} of {most}, split {split_k}"
            return self.working({name: self.call(acts, True, algorithm)}), ""
        except (RuntimeError, UnsupportedError, AttributeError, TypeError):  # the default ones remain
            return {}, ", search failed"

    def probe(self, call: Call) -> float:
        """Seconds of one call, roughly."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call(1)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def fastest(self, variants: dict[str, Call]) -> str:
        """In graphs: on the host a call takes longer than on the GPU."""
        recorded = [self.recorder.capture(call, self.PROBES) for call in variants.values()]
        times = self.recorder.times(recorded, 2)
        return min(zip(variants, times, strict=True), key=lambda pair: statistics.median(pair[1]))[0]


class TorchInt4(Peer):
    """torch's 4-bit weights with a scale and an offset a group, bfloat16."""

    tolerance = 0.02
    INNER_K_TILES = 8

    def __init__(self, weight: Weight) -> None:
        n, k, group = weight.n, weight.k, weight.group_size
        if n % 8 or k % (16 * self.INNER_K_TILES) or k % group:
            raise UnsupportedError(f"N a multiple of 8 and K of {16 * self.INNER_K_TILES} and the group only")
        self.group_size = group
        device = weight.dense.device
        nibbles = torch.randint(
            0, 256, (n, k // 2), dtype=torch.uint8, device=device
        )  # the even column is the high one
        scales = (torch.rand(k // group, n, device=device) + 0.5) / (8 * k**0.5)
        first = torch.stack([scales, scales * 0.25], dim=2).bfloat16().contiguous()
        head = nibbles[:CHECKED_FEATURES]
        codes = torch.stack([head >> 4, head & 15], dim=2).view(head.shape[0], k).float() - 8
        scale, offset = (part.t().repeat_interleave(group, dim=1) for part in first[:, : len(head)].float().unbind(2))
        self.head = codes * scale + offset
        self.weights = rotated(torch._convert_weight_to_int4pack(nibbles, self.INNER_K_TILES))
        self.scales_offsets = [first, *(first.clone() for _ in self.weights[1:])]

    def reference(self, a: torch.Tensor) -> torch.Tensor:
        return a.float() @ self.head.t()

    def prepare(self, a: torch.Tensor) -> Call:
        count = len(self.weights)
        return lambda i: torch._weight_int4pack_mm(
            a, self.weights[i % count], self.group_size, self.scales_offsets[i % count]
        )


class Fp8(Peer):
    """float8_e4m3 weights and activations with one scale each, for scale: the activations are converted beforehand."""

    tolerance = 0.05  # its fast accumulation keeps about 14 bits
    GAIN = 16.0  # weights of 0.02 would be among e4m3's subnormals

    def __init__(self, weight: Weight) -> None:
        if weight.n % 16 or weight.k % 16:
            raise UnsupportedError("N and K multiples of 16 only")
        self.dtype = weight.dense.dtype
        converted = (weight.dense * self.GAIN).to(FP8)
        self.head = converted[:CHECKED_FEATURES].float()
        self.weights = rotated(converted)
        self.one = torch.ones((), dtype=torch.float32, device=weight.dense.device)

    def reference(self, a: torch.Tensor) -> torch.Tensor:
        return a.to(FP8).float() @ self.head.t()

    def prepare(self, a: torch.Tensor) -> Call:
        acts = a.to(FP8)
        return lambda i: torch._scaled_mm(
            acts, self.weights[i % len(self.weights)].t(), self.one, self.one, out_dtype=self.dtype, use_fast_accum=True
        )
