"""The committed bytes of the packed format: the rule of the weight behind them, and the command that writes them.

python tests/golden/golden.py   # after a version bump; refuses to change the bytes of the version that is there
"""

import hashlib
import json
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
MANIFEST = FOLDER / "manifest.json"
RULE = (
    "x = 7919 * row + 104729 * quad + 12345. The non-zero positions of the quad are mask x % 11 of the eleven 4-bit "
    "masks of at most two bits, in rising order. The code at non-zero position p is v = 1 + (x * (p + 3)) % "
    "(2**bits - 1), as v or, above 2**(bits - 1) - 1, v - 2**bits."
)
N, K = 20, 132  # a partial slice of rows and a partial tile of columns


def rule_codes(n: int, k: int, num_bits: int) -> torch.Tensor:
    """The int8 codes [n, k] that RULE describes."""
    quad_size = 4
    masks = [mask for mask in range(1 << quad_size) if mask.bit_count() <= 2]
    codes = torch.zeros(n, k, dtype=torch.int8)
    for row in range(n):
        for quad in range(k // quad_size):
            x = 7919 * row + 104729 * quad + 12345
            for p in range(quad_size):
                if masks[x % len(masks)] >> p & 1:
                    v = 1 + x * (p + 3) % (2**num_bits - 1)
                    codes[row, quad * quad_size + p] = v if v < 2 ** (num_bits - 1) else v - 2**num_bits
    return codes


def main() -> None:
    from sparse_marlin import _core, pack_24_weights

    old = json.loads(MANIFEST.read_text()) if MANIFEST.exists() else {"format_version": None, "files": []}
    files, contents = [], {}
    for num_bits in _core.NUM_BITS:
        packed = pack_24_weights(rule_codes(N, K, num_bits), torch.ones(1, N), -1, num_bits)
        contents[f"int{num_bits}.bin"] = packed.numpy().astype("<i4").tobytes()
        digest = hashlib.sha256(contents[f"int{num_bits}.bin"]).hexdigest()
        files.append({"file": f"int{num_bits}.bin", "num_bits": num_bits, "n": N, "k": K, "sha256": digest})
    if old["format_version"] == _core.FORMAT_VERSION and old["files"] != files:
        raise SystemExit(f"the bytes differ from those of version {_core.FORMAT_VERSION}: bump kVersion in packed_24.h")
    for name, content in contents.items():
        (FOLDER / name).write_bytes(content)
    manifest = {"format": _core.FORMAT_NAME, "format_version": _core.FORMAT_VERSION, "rule": RULE, "files": files}
    MANIFEST.write_text(json.dumps(manifest, indent=2) + "\n")


if __name__ == "__main__":
    main()
