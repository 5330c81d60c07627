"""Times a model of Llama-3-8B's shape with random weights: decoding and the first token, dense against 2:4-sparse.

    python benchmarks/bench_model.py --out benchmarks/results/model.json
    python benchmarks/bench_model.py --batches 1 --compile --dependent-launch --combo-kernels --merged --prefetch

Both models are transformers' LlamaForCausalLM, in which q, k, v, gate and up are separate linears. --merged takes
Phi3ForCausalLM instead: the same layers with one linear for q, k and v and one for gate and up, as servers (vLLM, TGI)
run a Llama. In the sparse model every linear that `replace_linears` would convert is a SparseMarlinLinear of random
codes (nothing is packed); embedding, lm_head, attention and norms are the same in both. --lm-head converts that, too.

Decoding is one step of model.forward in a CUDA graph: the last of --context tokens, whose keys and values are written
to a cache of fixed size, then the most likely token becomes the next input. The step is repeated at the same place,
which costs what a step at that context costs. The first token is model.forward of a prompt and the choice of a token,
once in a CUDA graph and once as Python runs it. --compile runs all of this through torch.compile, which fuses small
kernels between the linears and takes minutes to start (fewer --layers: less); with --dependent-launch these kernels
may start before the one before has finished, as the sparse linears do (what TORCHINDUCTOR_ENABLE_PDL=1 sets); with
--combo-kernels, those that do not depend on each other are joined. All of this holds for both models. --prefetch tells
the sparse linears which one comes next (`sparse_marlin.enable_prefetch`). --merge-linears merges those of the sparse
model that read the same input (`sparse_marlin.merge_linears`), beside a dense LlamaForCausalLM as it is; compare with
--merged, where both models have them merged. --rank adds a low-rank correction to every sparse linear, with one first
factor for those that read the same input. Models take turns; the median counts.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
import transformers
from rich.console import Console
from rich.table import Table
from timing import full_precision_sums, graph_us, machine, positive_ints
from transformers import (
    AttentionInterface,
    Cache,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from weights import FACTOR_DEVIATION, check_rows, random_packed, random_scales

import sparse_marlin
from sparse_marlin import SparseMarlinLinear
from sparse_marlin.low_rank import quantize_up
from sparse_marlin.quantize import CHANNELWISE
from sparse_marlin.replace import module_bytes, survey

SHAPE: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "pad_token_id": 0,  # some id of the vocabulary
}
SETTINGS = ("compile", "dependent_launch", "combo_kernels", "merged", "merge_linears", "prefetch", "lm_head")
ATTENTION = "fixed_cache"
ROUNDS = 2
STEPS = 4  # of decoding, a graph
EAGER_CALLS = 8


class FixedCache(Cache):
    """Keys and values of so many tokens; `start` says where the next ones are written. Without device-side state, so
    that a captured step can be replayed in place."""

    def __init__(self, config: PretrainedConfig, batch: int, length: int, dtype: torch.dtype) -> None:
        super().__init__(layers=[])
        size = (batch, config.num_key_value_heads, length, config.hidden_size // config.num_attention_heads)
        self.keys = [torch.randn(size, device="cuda", dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.values = [torch.randn(size, device="cuda", dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.start = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        end = self.start + key_states.shape[2]
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys[:, :, self.start : end].copy_(key_states)
        values[:, :, self.start : end].copy_(value_states)
        return keys[:, :, :end], values[:, :, :end]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.start


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """All tokens of the cache are seen by the last one: there is nothing to mask beyond causality."""
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, scale=scaling, is_causal=query.shape[2] > 1, enable_gqa=True
    )
    return out.transpose(1, 2).contiguous(), None


def dense_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"):
            kind = Phi3ForCausalLM if isinstance(config, Phi3Config) else LlamaForCausalLM
            return kind(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def random_layer(linear: torch.nn.Linear, group_size: int, num_bits: int, rank: int) -> SparseMarlinLinear:
    k, n, dtype = linear.in_features, linear.out_features, linear.weight.dtype
    layer = SparseMarlinLinear(
        k, n, bias=False, group_size=group_size, num_bits=num_bits, device="meta", dtype=dtype
    ).eval()
    layer.weight_packed = random_packed(n, k, num_bits)
    layer.scales = random_scales(n, k, group_size, num_bits, dtype)
    if rank:  # equal values of `down` for equal k, each layer's in memory of its own
        same = torch.Generator("cuda").manual_seed(k)
        down = torch.randn(rank, k, device="cuda", dtype=dtype, generator=same)
        up = torch.randn(n, rank, device="cuda", dtype=dtype) * FACTOR_DEVIATION
        packed = up if group_size == CHANNELWISE else quantize_up(up, group_size, num_bits)
        layer._set_correction("random_layer", packed, down * FACTOR_DEVIATION)
    return layer


def make_sparse(model: PreTrainedModel, group_size: int, num_bits: int, lm_head: bool = False, rank: int = 0) -> int:
    """Replaces what `replace_linears` would; checks one layer of each shape against float64."""
    checked = set()
    found = survey(model, ignore=()) if lm_head else survey(model)
    chosen = [candidate for candidate in found if candidate.reason is None]
    for candidate in chosen:
        assert isinstance(candidate.module, torch.nn.Linear)
        layer = random_layer(candidate.module, group_size, num_bits, rank)
        if candidate.shape not in checked:
            checked.add(candidate.shape)
            a = torch.randn(17, layer.in_features, device="cuda", dtype=layer.scales.dtype)
            weight = (layer.weight_packed, layer.scales, group_size, num_bits)
            out = sparse_marlin.sparse_marlin_gemm(a, *weight)
            check_rows(a, out, *weight)
            correction = layer.correction()
            if correction is not None:
                up, down = correction
                out = out + a @ down.t() @ up.t()
            torch.testing.assert_close(layer(a), out, rtol=1e-2, atol=1e-2 * float(out.abs().max()))
        for parent, attribute in candidate.places:
            setattr(parent, attribute, layer)
    return len(chosen)


class Runner:
    """What is timed of a model."""

    def __init__(self, model: PreTrainedModel, compiled: bool) -> None:
        self.model, self.config, self.dtype = model, model.config, model.model.embed_tokens.weight.dtype
        self.next_token = torch.compile(self.forward, dynamic=False) if compiled else self.forward

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, cache: FixedCache) -> torch.Tensor:
        out = self.model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True)

    def decoding(self, batch: int, context: int) -> Callable[[], object]:
        cache = FixedCache(self.config, batch, context, self.dtype)
        cache.start = context - 1
        ids = torch.randint(0, self.config.vocab_size, (batch, 1), device="cuda")
        positions = torch.full((batch, 1), context - 1, device="cuda")

        def step() -> object:
            return ids.copy_(self.next_token(ids, positions, cache))

        return step

    def one_token(self) -> object:
        ids = torch.zeros((1, 1), dtype=torch.long, device="cuda")
        return self.forward(ids, ids, FixedCache(self.config, 1, 1, self.dtype))

    def merge(self) -> int:
        """Merges the sparse linears that read the same input."""
        return len(sparse_marlin.merge_linears(self.model, self.one_token))

    def link(self) -> int:
        """Tells the sparse linears what comes next."""
        return sparse_marlin.enable_prefetch(self.model, self.one_token)

    def first_token(self, prompt: int) -> Callable[[], object]:
        cache = FixedCache(self.config, 1, prompt, self.dtype)
        ids = torch.randint(0, self.config.vocab_size, (1, prompt), device="cuda")
        positions = torch.arange(prompt, device="cuda")[None]
        return lambda: self.next_token(ids, positions, cache)

    def check(self) -> None:
        """Decoding must continue what a prompt began, or the cache is wrong; nothing may overflow."""
        ids = torch.randint(0, self.config.vocab_size, (1, 33), device="cuda")
        positions = torch.arange(33, device="cuda")[None]
        cache = FixedCache(self.config, 1, 33, self.dtype)

        def logits(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            out = self.model(
                input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            return out.logits[0, -1].float()

        whole = logits(ids, positions)
        cache.start = 32
        step = logits(ids[:, 32:], positions[:, 32:])
        if not bool((step - whole).norm() <= 0.05 * whole.norm()):  # NaN, too
            raise AssertionError(f"a step differs from the prompt by {float((step - whole).norm() / whole.norm()):.2e}")


def eager_us(call: Callable[[], object]) -> list[float]:
    """Microseconds from the call to its result, Python included."""
    times = []
    for i in range(EAGER_CALLS + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        if i >= 2:
            times.append((time.perf_counter() - start) * 1e6)
    return times


def compare(runners: dict[str, Runner], times_of: Callable[[Runner], list[float]]) -> dict[str, object]:
    """Milliseconds of both, in turn."""
    times: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(ROUNDS):
        for name, runner in runners.items():
            times[name] += [us / 1e3 for us in times_of(runner)]
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        **{f"{name}_ms": value for name, value in median.items()},
        **{f"{name}_range": [min(values), max(values)] for name, values in times.items()},
        "speedup": median["dense"] / median["sparse"],
    }


def measure(runners: dict[str, Runner], args: argparse.Namespace) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for batch in args.batches:

        def decode(runner: Runner, batch: int = batch) -> list[float]:
            step = runner.decoding(batch, args.context)
            step()  # compiles and loads, before anything is captured
            return graph_us(lambda _: step(), STEPS)

        row = compare(runners, decode)
        for name in runners:
            row[f"{name}_tokens_per_s"] = batch / float(str(row[f"{name}_ms"])) * 1e3
        rows.append({"what": "decode", "batch": batch, "context": args.context, **row})
        torch.cuda.empty_cache()

    def first(runner: Runner) -> list[float]:
        call = runner.first_token(args.prompt)
        call()
        return graph_us(lambda _: call(), 1)

    rows.append({"what": "first token, graph", "batch": 1, "context": args.prompt, **compare(runners, first)})
    eager = compare(runners, lambda runner: eager_us(runner.first_token(args.prompt)))
    rows.append({"what": "first token, eager", "batch": 1, "context": args.prompt, **eager})
    return rows


def print_table(result: dict[str, object], rows: list[dict[str, object]]) -> None:
    table = Table(
        title=f"{result['gpu']}, {result['layers']} layers, {result['dtype']} against {result['num_bits']} bits, "
        f"group {result['group_size']}, rank {result['rank']}"
        + "".join(f", {name}" for name in SETTINGS if result[name])
    )
    for column in ("what", "batch", "tokens", "dense ms", "sparse ms", "x", "dense tokens/s", "sparse tokens/s"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for row in rows:
        rates = [
            f"{float(str(row[key])):.0f}" if key in row else "" for key in ("dense_tokens_per_s", "sparse_tokens_per_s")
        ]
        table.add_row(
            str(row["what"]), str(row["batch"]), str(row["context"]), f"{float(str(row['dense_ms'])):.2f}",
            f"{float(str(row['sparse_ms'])):.2f}", f"{float(str(row['speedup'])):.2f}", *rates,
        )  # fmt: skip
    Console(width=130).print(table)
    print(f"bytes of the model: dense {result['dense_gb']:.2f} GB, sparse {result['sparse_gb']:.2f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--num-bits", type=int, choices=(4, 8), default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--batches", type=positive_ints, default=[1, 16, 64])
    parser.add_argument("--context", type=int, default=512, help="tokens that a decoding step sees")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens before the first token")
    parser.add_argument("--compile", action="store_true", help="both models through torch.compile")
    parser.add_argument("--dependent-launch", action="store_true", help="for torch.compile's kernels, too")
    parser.add_argument("--combo-kernels", action="store_true", help="let torch.compile join independent kernels")
    parser.add_argument("--merged", action="store_true", help="q, k, v in one linear, gate and up in one")
    parser.add_argument("--rank", type=int, default=0, help="of a low-rank correction of the sparse linears")
    parser.add_argument("--merge-linears", action="store_true", help="in the sparse model alone, by merge_linears")
    parser.add_argument("--prefetch", action="store_true", help="the sparse linears are told which one comes next")
    parser.add_argument("--lm-head", action="store_true", help="the sparse model's lm_head is sparse, too")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if args.dependent_launch and not args.compile:
        parser.error("--dependent-launch: expected --compile, whose kernels it is about")
    if args.combo_kernels and not args.compile:
        parser.error("--combo-kernels: expected --compile, whose kernels it is about")
    if args.merged and args.merge_linears:
        parser.error("--merge-linears: expected no --merged, whose linears are merged already")
    torch.manual_seed(0)
    full_precision_sums()
    if args.dependent_launch:
        torch._inductor.config.triton.enable_pdl = True
    torch._inductor.config.combo_kernels = args.combo_kernels
    torch._dynamo.config.recompile_limit = 64  # batch sizes and models that share their code
    AttentionInterface.register(ATTENTION, attention)
    kind = Phi3Config if args.merged else LlamaConfig
    config = kind(**SHAPE, num_hidden_layers=args.layers, attn_implementation=ATTENTION)
    dtype = getattr(torch, args.dtype)
    with torch.no_grad():
        dense, sparse = dense_model(config, dtype), dense_model(config, dtype)
        converted = make_sparse(sparse, args.group_size, args.num_bits, args.lm_head, args.rank)
        torch.cuda.empty_cache()
        runners = {"dense": Runner(dense, args.compile), "sparse": Runner(sparse, args.compile)}
        if args.merge_linears:
            print(f"{runners['sparse'].merge()} groups of linears that are multiplied at once")
        for runner in runners.values():
            runner.check()
        if args.prefetch:
            print(f"{runners['sparse'].link()} linears know the next one")
        rows = measure(runners, args)
    result: dict[str, object] = {
        **machine(),
        "transformers": transformers.__version__,
        "dtype": args.dtype,
        "num_bits": args.num_bits,
        "group_size": args.group_size,
        "rank": args.rank,
        "layers": args.layers,
        "linears": converted,
        **{name: getattr(args, name) for name in SETTINGS},
        "dense_gb": module_bytes(dense) / 1e9,
        "sparse_gb": module_bytes(sparse) / 1e9,
        "rows": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print_table(result, rows)


if __name__ == "__main__":
    main()
