"""Replace the linears of a model and generate: python examples/replace_linears.py [MODEL] [PROMPT]

MODEL is a directory, a .gguf file or a hub name; without it the demo model is downloaded once (93 MB).
"""

import sys

import sparse_marlin
from sparse_marlin.evaluate import generate_greedy
from sparse_marlin.model import load_model


def main() -> None:
    source = sys.argv[1] if len(sys.argv) > 1 else None
    prompt = sys.argv[2] if len(sys.argv) > 2 else "The capital of France is"
    loaded = load_model(source)
    dense = generate_greedy(loaded.model, loaded.tokenizer, prompt, max_new_tokens=24)

    report = sparse_marlin.replace_linears(loaded.model, group_size=64, num_bits=4, progress=True)
    sparse = generate_greedy(loaded.model, loaded.tokenizer, prompt, max_new_tokens=24)

    print(report)
    print(f"\ndense : {prompt}{dense.text}\nsparse: {prompt}{sparse.text}")


if __name__ == "__main__":
    main()
