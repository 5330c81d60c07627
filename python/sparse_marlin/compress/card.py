"""The model card (README.md) of a compressed model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._version import __version__

_CARD = """---
library_name: sparse_marlin
base_model: {base}
tags: [sparse-marlin, "2:4", int4]
---

# {name}

{base} with {converted} of {total} linear layers in 2:4-sparse {bits}-bit codes (group size {group}{correction}),
made in one shot by sparse_marlin {version} with the method `{quality}`. No training.

```python
import sparse_marlin  # before loading: without it transformers does not know these layers
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

## What it lost

| | dense | compressed |
| --- | --- | --- |
| perplexity | {dense:.3f} | {compressed:.3f} |
| files, MB | {before:.1f} | {after:.1f} |

Perplexity of {tokens} tokens of {text}, windows of {seq_len} tokens, each scored alone.
Mean relative error of the layers' outputs on the calibration text: {error:.4f}.

Calibrated on {calibration} ({sequences}). The licence of the original model applies.
"""


def _correction(options: Mapping[str, Any]) -> str:
    if not options["rank"]:
        return ""
    shared = ", one first factor for linears of the same input" if options["shared_correction"] else ""
    return f", low-rank correction of rank {options['rank']}{shared}"


def model_card(result: Mapping[str, Any]) -> str:
    """README.md for a folder, from `CompressResult.to_dict()`."""
    options, report = result["options"], result["report"]
    # A folder of this machine means nothing elsewhere: its last component, a hub name as a whole.
    base = Path(options["source"]).name if Path(options["source"]).exists() else options["source"]
    count, length = options["num_sequences"], options["seq_len"]
    given = [
        f"{count} sequences" if count else "",
        f"{length} tokens each" if length else "",
        f"seed {options['seed']}",
    ]
    return _CARD.format(
        base=base,
        name=Path(options["out"]).name,
        converted=report["num_converted"],
        total=report["num_converted"] + report["num_dense"],
        bits=report["num_bits"],
        group=report["group_size"],
        correction=_correction(options),
        version=__version__,
        quality=options["quality"],
        dense=result["dense"]["perplexity"],
        compressed=result["compressed"]["perplexity"],
        before=result["bytes_before"] / 1e6,
        after=result["bytes_after"] / 1e6,
        tokens=result["compressed"]["scored_tokens"],
        text=result["text"],
        seq_len=result["compressed"]["seq_len"],
        error=report["mean_output_error"] or 0.0,
        calibration=Path(options["calibration"]).name,
        sequences=", ".join(part for part in given if part),
    )
