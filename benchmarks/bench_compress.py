"""Time and memory of `sparse_marlin.compress` on decoder blocks of a large model's shape, with random weights.

    python benchmarks/bench_compress.py                      # two blocks of Llama-3-8B's shape, 256 x 2048 tokens
    python benchmarks/bench_compress.py --blocks 2 --rank 64 --json out.json

The model lies in host memory and is lent to the GPU block by block, as the command does it. Time is per block, and the
whole model's is that times its number of blocks; the peak is what torch allocated on the GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))

from transformers import LlamaConfig, LlamaForCausalLM

from sparse_marlin.compress import DEFAULT_QUALITY, QUALITIES, compress
from sparse_marlin.demo import device_name

# hidden, intermediate, heads, key-value heads, blocks of the whole model
SHAPES = {"llama-3-8b": (4096, 14336, 32, 8, 32), "llama-3-1b": (2048, 8192, 32, 8, 16)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-3-8b")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--quality", choices=QUALITIES, default=DEFAULT_QUALITY)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--num-sequences", type=int, default=256)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    hidden, intermediate, heads, kv_heads, blocks = SHAPES[options.shape]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=options.blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=max(options.seq_len, 2048),
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for name, tensor in model.state_dict().items():
        tensor.fill_(1) if name.endswith("norm.weight") else tensor.normal_(0, 0.02)
    rotary = type(model.model.rotary_emb)(config)  # its frequencies are no part of the state dict
    model.model.rotary_emb = rotary
    model.eval()
    tokens = torch.randint(0, 4096, (options.num_sequences, options.seq_len))
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    report = compress(model, tokens, device=device, quality=options.quality, rank=options.rank, progress=True)
    seconds = time.perf_counter() - start
    result = {
        "shape": options.shape,
        "device": device_name(device),
        "torch": torch.__version__,
        "quality": options.quality,
        "rank": options.rank,
        "tokens": tokens.numel(),
        "blocks": options.blocks,
        "seconds_per_block": seconds / options.blocks,
        "minutes_of_the_whole_model": seconds / options.blocks * blocks / 60,
        "peak_gb": torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None,
        "mean_output_error": report.mean_output_error,
    }
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
