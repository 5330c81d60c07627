"""How settings of `sparse_marlin.compress` were chosen: SmolLM2-135M-Instruct with its first blocks compressed, judged
on texts that no accuracy table is evaluated on (`accuracy_text.validation_texts`).

    python benchmarks/scan_compress.py --damping 0.01 0.03 0.1 0.3
    python benchmarks/scan_compress.py --follow 0 0.5 1       # layerwise.FOLLOW
    python benchmarks/scan_compress.py --num-sequences 64 128 256 --seq-len 256 512

Every combination of the values given is tried. Printed: perplexity of each text, and the mean of the logarithm of
perplexity over the dense model's, which is what to compare.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import sys
import time
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))

from accuracy_text import validation_texts
from bench_accuracy import densify

from sparse_marlin.compress import DEFAULT_QUALITY, QUALITIES, compress, layerwise
from sparse_marlin.compress.calibration import calibration_tokens
from sparse_marlin.evaluate import perplexity
from sparse_marlin.model import load_model


def main() -> None:
    options = parse()
    warnings.simplefilter("ignore")
    device = torch.device(options.device)
    loaded = load_model(None, device=torch.device("cpu"), dtype=torch.float32)
    text, judges = validation_texts()

    def judge(model: torch.nn.Module) -> list[float]:
        settings = {"seq_len": 512, "max_tokens": options.eval_tokens}
        return [
            math.log(perplexity(model, loaded.tokenizer, other, **settings).perplexity) for other in judges.values()
        ]

    dense = judge(loaded.model.to(device))
    loaded.model.to("cpu")
    print("| quality | follow | damping | calibration | " + " | ".join(judges) + " | mean excess | seconds |")
    print("| --- |" + " --- |" * (len(judges) + 5))
    print("| dense | | | | " + " | ".join(f"{math.exp(value):.2f}" for value in dense) + " | | |", flush=True)
    blocks = len(loaded.model.model.layers)
    ignore = ["lm_head", *(rf"re:.*layers\.{index}\..*" for index in range(options.blocks or blocks, blocks))]
    scanned = (options.quality, options.num_sequences, options.seq_len, options.follow, options.damping)
    for quality, count, length, follow, damping in itertools.product(*scanned):
        layerwise.FOLLOW = follow
        tokens = calibration_tokens(text, loaded.tokenizer, seq_len=length, num_sequences=count, seed=options.seed)
        model = copy.deepcopy(loaded.model).to(device)
        start = time.process_time()
        compress(model, tokens, quality=quality, damping=damping, group_size=options.group_size, ignore=ignore)
        seconds = time.process_time() - start
        densify(model)
        found = judge(model)
        excess = sum(a - b for a, b in zip(found, dense, strict=True)) / len(found)
        print(
            f"| {quality} | {follow:g} | {damping:g} | {count} x {length} | "
            + " | ".join(f"{math.exp(value):.2f}" for value in found)
            + f" | {excess:.4f} | {seconds:.0f} |",
            flush=True,
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quality", nargs="+", choices=QUALITIES, default=[DEFAULT_QUALITY])
    parser.add_argument("--damping", nargs="+", type=float, default=[layerwise.DEFAULT_DAMPING])
    parser.add_argument("--follow", nargs="+", type=float, default=[layerwise.FOLLOW])
    parser.add_argument("--num-sequences", nargs="+", type=int, default=[128])
    parser.add_argument("--seq-len", nargs="+", type=int, default=[256])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=0, help="compress the first so many; default: all")
    parser.add_argument("--eval-tokens", type=int, default=8192, help="of each text")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
