"""Small models and tokens that the tests of compress share."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

VOCABULARY = 320


def llama(device="cpu", dtype=torch.float32, layers=2, **options):
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 100,  # no multiple of any group size
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "pad_token_id": 0,
    }
    config = transformers.LlamaConfig(**{**settings, **options})
    return transformers.LlamaForCausalLM(config).eval().to(device=device, dtype=dtype)


def tokens(count=24, length=24, seed=1):
    return torch.randint(1, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


def tensors(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def logits(model, ids):
    with torch.inference_mode():
        return model(ids.to(next(model.parameters()).device)).logits.float().cpu()
