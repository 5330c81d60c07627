"""Time and memory of `sparse_marlin.compress` on one decoder block of a large model's shape, with random weights.

    python benchmarks/bench_compress.py                      # Llama-3-8B's shape, 256 x 2048 tokens: about a minute
    python benchmarks/bench_compress.py --rank 64 --json out.json

The block goes through all that a block of a compression goes through: lent to the GPU from host memory, its Hessians
accumulated, its linears solved and packed, the hidden states handed on. The GPU's libraries are started before, on a
small block. What a whole model takes is not measured: the time of this block times the model's number of blocks is
printed as an extrapolation. Memory is the peak of what torch allocated and of what it reserved.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))

from transformers import LlamaConfig, LlamaForCausalLM

from sparse_marlin._progress import TwoBars
from sparse_marlin.compress import DEFAULT_QUALITY, QUALITIES
from sparse_marlin.compress.blocks import block_inputs, find_blocks
from sparse_marlin.compress.layerwise import DEFAULT_DAMPING, BlockRun, Settings
from sparse_marlin.compress.solvers import solver
from sparse_marlin.compress.state import State
from sparse_marlin.demo import device_name
from sparse_marlin.replace import Replacement, select

# hidden, intermediate, heads, key-value heads, blocks of the whole model
SHAPES = {
    "llama-3-8b": (4096, 14336, 32, 8, 32),
    "llama-3-1b": (2048, 8192, 32, 8, 16),
    "smollm2-135m": (576, 1536, 9, 3, 30),
    "tiny": (128, 256, 4, 2, 1),
}
GROUP_SIZE = 128
BATCH_TOKENS = 16384


class Laps(TwoBars):
    """Seconds of each step of the block, the device's work included."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.seconds = device, {}
        self._now, self._since = "", 0.0

    def inner(self, description: str, total: int | None) -> None:
        self.stop()
        self._now, self._since = description, time.perf_counter()

    def stop(self) -> None:
        synchronize(self.device)
        if self._now:
            self.seconds[self._now] = time.perf_counter() - self._since
        self._now = ""


def main() -> None:
    options = parse()
    device = torch.device(options.device)
    warnings.simplefilter("ignore")
    if device.type == "cuda":
        measure("tiny", 4, 128, options, device)
    result = measure(options.shape, options.num_sequences, options.seq_len, options, device)
    text = json.dumps(result, indent=1)
    print(text)
    blocks = result["blocks of the whole model"]
    print(
        f"one block: {result['seconds of one block']:.1f} s, measured; all {blocks} blocks of {options.shape}: "
        f"{result['minutes of the whole model, extrapolated']:.1f} minutes, extrapolated from it, not measured"
    )
    if options.json:
        options.json.write_text(text + "\n")


@torch.no_grad()
def measure(shape: str, sequences: int, length: int, options: argparse.Namespace, device: torch.device) -> Any:
    blocks = SHAPES[shape][-1]
    model = random_model(shape, length)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (sequences, length), generator=generator)
    settings = Settings(
        options.quality, solver(options.quality), GROUP_SIZE, 4, options.rank, None, "dense", None, DEFAULT_DAMPING
    )
    chosen = select(model, ("lm_head",), group_size=GROUP_SIZE, num_bits=4, caller="bench").chosen
    (block,), _ = find_blocks(model, chosen)
    hidden, calls = block_inputs(model, [block], list(tokens.split(max(1, BATCH_TOKENS // length))))
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    run, laps = BlockRun(settings, {}, device, State(None)), Laps(device)
    hidden = run.store(hidden)
    synchronize(device)
    start = time.perf_counter()
    made = run.block(0, block, hidden, list(hidden), calls[0], "", laps, propagate=True)
    laps.stop()
    seconds = time.perf_counter() - start
    errors = {name.rpartition(".")[2]: new.output_error for name, new in made.items() if isinstance(new, Replacement)}
    on_gpu = device.type == "cuda"
    return {
        "shape": shape,
        "device": device_name(device),
        "torch": torch.__version__,
        "quality": options.quality,
        "rank": options.rank,
        "calibration": f"{sequences} sequences of {length} tokens",
        "seconds of one block": seconds,
        "seconds of its steps": laps.seconds,
        "blocks of the whole model": blocks,
        "minutes of the whole model, extrapolated": seconds * blocks / 60,
        "peak GB allocated": torch.cuda.max_memory_allocated(device) / 1e9 if on_gpu else None,
        "peak GB reserved": torch.cuda.max_memory_reserved(device) / 1e9 if on_gpu else None,
        "output errors": errors,
    }


def random_model(shape: str, length: int) -> LlamaForCausalLM:
    """A model of one block in host memory, bfloat16."""
    hidden, intermediate, heads, kv_heads, _ = SHAPES[shape]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=max(length, 2048),
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for name, tensor in model.state_dict().items():
        tensor.fill_(1) if name.endswith("norm.weight") else tensor.normal_(0, 0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its frequencies are no part of the state dict
    return model.eval()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-3-8b")
    parser.add_argument("--quality", choices=QUALITIES, default=DEFAULT_QUALITY)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--num-sequences", type=int, default=256)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
