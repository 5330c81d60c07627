"""The multiplications that bench_plan.py looks at: linears of language models from 1B to 405B. Needs no GPU."""

import random
from dataclasses import dataclass

# hidden size, features of qkv, inner size of the MLP (gate and up are one linear)
MODELS = {
    "Llama 1B": (2048, 3072, 8192),
    "Llama 3B": (3072, 5120, 8192),
    "Qwen 7B": (3584, 4608, 18944),
    "Llama 8B": (4096, 6144, 14336),
    "Qwen 14B": (5120, 7168, 13824),
    "Qwen 32B": (5120, 7168, 27648),
    "Llama 70B": (8192, 10240, 28672),
    "Llama 405B": (16384, 18432, 53248),
}
WORLD_SIZES = (1, 2, 4, 8)
TOKENS = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192, 16384]
LOW_RANK_TOKENS = [1, 2, 4, 6, 8, 12, 16]
SMALLEST = 512  # features of either side


@dataclass(frozen=True)
class Shape:
    name: str
    k: int
    n: int


def shapes() -> list[Shape]:
    """Every different one once, under the name of the first model that has it."""
    found: dict[tuple[int, int], Shape] = {}
    for model, (hidden, qkv, inner) in MODELS.items():
        for world in WORLD_SIZES:
            linears = {
                "qkv": (hidden, qkv // world),
                "o": (hidden // world, hidden),
                "gate_up": (hidden, 2 * inner // world),
                "down": (inner // world, hidden),
            }
            for linear, (k, n) in linears.items():
                if min(k, n) >= SMALLEST:
                    found.setdefault((k, n), Shape(f"{model} {linear}" + (f" / {world}" if world > 1 else ""), k, n))
    return list(found.values())


def problems(count: int, models: list[str], rank: int) -> list[tuple[int, Shape]]:
    """(tokens, shape), in rounds of one problem for each number of tokens; the same ones in every run."""
    tokens = LOW_RANK_TOKENS if rank else TOKENS
    draw = random.Random(0)
    wanted = [shape for shape in shapes() if not models or any(shape.name.startswith(model) for model in models)]
    if models:
        wanted = [shape for shape in wanted if " / " not in shape.name]
    decks = {m: draw.sample(wanted, len(wanted)) for m in tokens}
    rounds = [[(m, decks[m][i]) for m in tokens] for i in range(len(wanted))]
    for one in rounds:
        draw.shuffle(one)
    return [problem for one in rounds for problem in one][:count]


def one_problem(text: str) -> tuple[int, Shape]:
    m, n, k = map(int, text.split(","))
    return m, Shape(f"{k} -> {n}", k, n)
