"""Processes for tests of tensor parallelism, and the Llama-shaped models they share out."""

import os
import socket
import tempfile
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sparse_marlin import SparseMarlinLinear
from sparse_marlin.testing import random_codes, random_scales


def _process(rank, world_size, port, results, function, arguments):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    try:
        torch.save(function(*arguments), Path(results) / f"{rank}.pt")
    except BaseException:
        Path(results, f"{rank}.txt").write_text(traceback.format_exc())
        raise
    finally:
        dist.destroy_process_group()


def run_processes(world_size, function, *arguments):
    """What `function(*arguments)`, a function of a module, returns on each rank of a gloo group on the CPU."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as results:
        try:
            mp.spawn(_process, (world_size, port, results, function, arguments), nprocs=world_size)
        except Exception as error:
            said = "\n".join(path.read_text() for path in sorted(Path(results).glob("*.txt")))
            raise AssertionError(f"{error}\n{said}") from error
        return [torch.load(Path(results) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def random_layer(n, k, bias=False, group_size=128, num_bits=4, seed=0, dtype=torch.float32, device="cpu"):
    """A packed layer with scales that keep the size of activations."""
    codes = random_codes(n, k, num_bits, seed)
    scales = random_scales(n, k, group_size, torch.float32, seed) * (25 / k**0.5 if num_bits == 4 else 1.6 / k**0.5)
    offset = 0.1 * torch.randn(n, generator=torch.Generator().manual_seed(seed + 3)) if bias else None
    layer = SparseMarlinLinear.from_codes(codes, scales.to(dtype), offset, group_size=group_size, num_bits=num_bits)
    return layer.to(device).requires_grad_(False)


def tiny_llama(seed=0, layers=2, dtype=torch.float32, device="cpu", group_size=128, num_bits=4, **changes):
    """A LlamaForCausalLM of random packed layers, grouped-query heads, with its dense twin's settings in `changes`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": 320,
        "hidden_size": 256,
        "intermediate_size": 640,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "mlp_bias": True,
        **changes,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    torch.nn.init.normal_(model.model.embed_tokens.weight)  # tokens that differ give texts that differ
    for index, (name, module) in enumerate(list(model.named_modules())):
        if type(module) is torch.nn.Linear and name != "lm_head":
            parent, _, attribute = name.rpartition(".")
            layer = random_layer(
                module.out_features, module.in_features, module.bias is not None, group_size, num_bits, seed + index
            )
            setattr(model.get_submodule(parent), attribute, layer)
    return model.to(device=device, dtype=dtype).requires_grad_(False)
