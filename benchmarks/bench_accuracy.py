"""Perplexity of SmolLM2-135M-Instruct compressed in one shot by every method: the table of docs/ACCURACY.md.

    python benchmarks/bench_accuracy.py --seeds 0 1 2                          # downloads the model and the texts once
    python benchmarks/bench_accuracy.py --device cuda --model M.gguf --calibration C.txt --evaluation A.txt B.txt
    python benchmarks/bench_accuracy.py --only joint sparsegpt+r64 --seeds 0   # some rows
    python benchmarks/bench_accuracy.py --markdown                             # the table from the results

Each row is calibrated with each seed (which draws the calibration sequences) on one text and evaluated on texts that
were not calibrated on. Results of single runs are added to the JSON file as they come (rows that are there for the
same settings are not run again), so runs may be divided between processes. "Excess" is perplexity minus the dense
model's.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))

import sparse_marlin
from sparse_marlin import SparseMarlinLinear
from sparse_marlin.compress import compress
from sparse_marlin.compress.layerwise import DEFAULT_DAMPING, FOLLOW
from sparse_marlin.demo import device_name
from sparse_marlin.evaluate import PERPLEXITY_PROTOCOL, perplexity
from sparse_marlin.model import load_model, read_text
from sparse_marlin.testing.baselines import gptq_int4, old_recipe, sparsegpt_24

RESULTS = Path(__file__).resolve().parent / "results"
RANK = 64
SHARED = " shared"  # one first factor of the correction for linears that read the same input
PUBLISHED_DAMPING = 0.01  # of the methods of others
# Row: (what `compress` is given, rank, whether the seed matters)
ROWS: dict[str, tuple[Any, int, bool]] = {
    "dense": (None, 0, False),
    "INT4 only": (gptq_int4, 0, True),
    "2:4 only": (sparsegpt_24, 0, True),
    "old recipe": (old_recipe, 0, True),
    "magnitude": ("magnitude", 0, False),
    "wanda": ("wanda", 0, True),
    "sparsegpt": ("sparsegpt", 0, True),
    "alps": ("alps", 0, True),
    "joint": ("joint", 0, True),
    f"magnitude+r{RANK}": ("magnitude", RANK, True),
    f"wanda+r{RANK}": ("wanda", RANK, True),
    f"sparsegpt+r{RANK}": ("sparsegpt", RANK, True),
    f"alps+r{RANK}": ("alps", RANK, True),
    f"joint+r{RANK}": ("joint", RANK, True),
    f"joint+r{RANK}{SHARED}": ("joint", RANK, True),
    f"joint+r{RANK * 3 // 2}{SHARED}": ("joint", RANK * 3 // 2, True),
}
LABELS = {
    "INT4 only": "INT4 only (GPTQ with clipped scales)",
    "2:4 only": "2:4 only (SparseGPT)",
    "old recipe": "old recipe (SparseGPT, then zero-preserving GPTQ)",
}


def main() -> None:
    options = parse()
    if options.markdown:
        print(markdown(json.loads(options.out.read_text())))
        return
    device = torch.device(options.device)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    calibration, evaluation = corpora(options)
    # float32 everywhere: SmolLM2-135M is small, and rounding of activations would only blur the comparison.
    loaded = load_model(options.model, device=torch.device("cpu"), dtype=torch.float32)
    record = Record(options.out, about(options, device, calibration, evaluation))
    texts = {label: read_text(path)[1] for label, path in evaluation.items()}
    for name in options.only or ROWS:
        method, rank, seeded = ROWS[name]
        for seed in options.seeds if seeded else options.seeds[:1]:
            if record.has(name, seed, seeded):
                continue
            model = copy.deepcopy(loaded.model).to(device)
            entry: dict[str, Any] = {"row": name, "seed": seed if seeded else None}
            if method is not None:
                start, used = time.perf_counter(), time.process_time()
                report = compress(
                    model,
                    Path(calibration),
                    tokenizer=loaded.tokenizer,
                    quality=method,
                    rank=rank,
                    shared_correction=name.endswith(SHARED),
                    group_size=options.group_size,
                    num_sequences=options.num_sequences,
                    seq_len=options.seq_len,
                    seed=seed,
                    damping=options.damping if isinstance(method, str) else PUBLISHED_DAMPING,
                    progress=options.progress,
                )
                entry["seconds"], entry["cpu_seconds"] = time.perf_counter() - start, time.process_time() - used
                errors = [layer.output_error for layer in report if layer.output_error is not None]
                entry["mean_output_error"] = statistics.fmean(errors)
                entry["bytes_after"] = report.bytes_after if report.converted else None
                densify(model)
            for label, text in texts.items():
                found = perplexity(
                    model, loaded.tokenizer, text, seq_len=options.eval_seq_len, max_tokens=options.eval_tokens
                )
                entry[label] = found.perplexity
                entry[f"{label} tokens"] = found.scored_tokens
            record.add(entry)
            shown = ", ".join(f"{label} {entry[label]:.3f}" for label in texts)
            print(f"{name:18} seed {seed}: {shown}  ({entry.get('seconds', 0):.1f} s)", flush=True)
            del model


def densify(model: torch.nn.Module) -> None:
    """The same weights in dense layers: float32 runs on every device, and what is measured is the weights."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, SparseMarlinLinear):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, layer.to_linear())


class Record:
    """The JSON file: settings, and one entry for every run. Safe with several processes that write it."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        self._update(None)

    def has(self, row: str, seed: int, seeded: bool) -> bool:
        runs = json.loads(self.path.read_text())["runs"]
        return any(run["row"] == row and run["seed"] in ((seed,) if seeded else (None,)) for run in runs)

    def add(self, entry: dict[str, Any]) -> None:
        self._update(entry)

    def _update(self, entry: dict[str, Any] | None) -> None:
        import fcntl

        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path.with_suffix(".lock.tmp"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            old = json.loads(self.path.read_text()) if self.path.exists() else {"settings": self.settings, "runs": []}
            if old["settings"] != self.settings:
                raise SystemExit(f"{self.path}: has results of other settings; give another --out")
            if entry is not None:
                old["runs"].append(entry)
            partial = self.path.with_suffix(".partial.tmp")
            partial.write_text(json.dumps(old, indent=1) + "\n")
            os.replace(partial, self.path)


def corpora(options: argparse.Namespace) -> tuple[str, dict[str, Path]]:
    if options.calibration:
        labels = ("same corpus", "other corpus") if len(options.evaluation) == 2 else options.evaluation
        return options.calibration, dict(zip(labels, map(Path, options.evaluation), strict=True))
    from accuracy_text import texts

    paths = texts()
    return str(paths.pop("calibration")), paths


def about(options: argparse.Namespace, device: torch.device, calibration: str, evaluation: dict[str, Path]) -> Any:
    return {
        "model": Path(options.model).name if options.model else "SmolLM2-135M-Instruct (Q4_1, dequantized)",
        "device": device_name(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "sparse_marlin": sparse_marlin.__version__,
        "group_size": options.group_size,
        "damping": options.damping,
        "follow": FOLLOW,
        "calibration": {
            "text": Path(calibration).name,
            "sequences": options.num_sequences,
            "tokens of each": options.seq_len,
        },
        "evaluation": {label: path.name for label, path in evaluation.items()},
        "protocol": PERPLEXITY_PROTOCOL,
        "seq_len": options.eval_seq_len,
        "max_tokens": options.eval_tokens,
    }


def markdown(record: dict[str, Any]) -> str:
    """The table: mean and range over the seeds, and the excess as a share of the old recipe's."""
    labels = list(record["settings"]["evaluation"])
    by_row: dict[str, list[dict[str, Any]]] = {}
    for run in record["runs"]:
        by_row.setdefault(run["row"], []).append(run)
    mean = {
        row: {label: statistics.fmean(run[label] for run in runs) for label in labels} for row, runs in by_row.items()
    }
    lines = [
        "| | " + " | ".join(f"{label} | excess / old recipe's" for label in labels) + " | output error | seconds |",
        "| --- |" + " --- |" * (2 * len(labels) + 2),
    ]
    for row in ROWS:
        if row not in by_row:
            continue
        runs, cells = by_row[row], [LABELS.get(row, row)]
        for label in labels:
            values = [run[label] for run in runs]
            spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
            cells.append(f"{mean[row][label]:.2f}{spread}")
            share = ""
            if "old recipe" in mean and row != "dense":
                base = mean["dense"][label]
                share = f"{(mean[row][label] - base) / (mean['old recipe'][label] - base):.2f}"
            cells.append(share)
        errors = [run["mean_output_error"] for run in runs if "mean_output_error" in run]
        cells.append(f"{statistics.fmean(errors):.3f}" if errors else "")
        cells.append(f"{statistics.fmean(run['seconds'] for run in runs):.0f}" if errors else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", help="model directory or .gguf file; default: SmolLM2-135M-Instruct, downloaded")
    parser.add_argument("--calibration", help="text file; default: downloaded")
    parser.add_argument("--evaluation", nargs="+", help="text files, with --calibration")
    parser.add_argument("--only", nargs="+", choices=list(ROWS), metavar="ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--num-sequences", type=int, default=256)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--damping", type=float, default=DEFAULT_DAMPING, help="of our own methods")
    parser.add_argument("--eval-seq-len", type=int, default=512)
    parser.add_argument("--eval-tokens", type=int, default=65536)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--progress", action="store_true")
    parser.add_argument("--out", type=Path, help="JSON file; default: in benchmarks/results, named after the device")
    parser.add_argument("--markdown", action="store_true", help="print the table of --out and do nothing else")
    options = parser.parse_args()
    if bool(options.calibration) != bool(options.evaluation):
        parser.error("--calibration and --evaluation go together")
    if options.out is None:
        options.out = RESULTS / f"accuracy_smollm2_{options.device.partition(':')[0]}.json"
    return options


if __name__ == "__main__":
    main()
