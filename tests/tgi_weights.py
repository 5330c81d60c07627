"""Files of checkpoints in every naming, and the part of text-generation-inference's `Weights` that loaders use."""

import torch
from old_packers import marlin_24
from safetensors import safe_open
from safetensors.torch import save_file

from sparse_marlin import SparseMarlinLinear
from sparse_marlin.checkpoint import CheckpointConfig, LayerSpec
from sparse_marlin.testing import random_codes

NAMINGS = {
    "gptq": ("B_24", "B_meta", "s"),
    "compressed-tensors": ("weight_packed", "meta", "scale_packed"),
    "own": ("weight_packed", "scales"),
}


class Group:
    """A rank of a process group that does not exist."""

    def __init__(self, rank=0, world_size=1):
        self._rank, self._size = rank, world_size

    def rank(self):
        return self._rank

    def size(self):
        return self._size


class Weights:
    """Names over several files, as that project's class answers them. Counts the bytes that were read."""

    def __init__(self, filenames, device, dtype, process_group):
        self.routing = {}
        for filename in filenames:
            with safe_open(filename, framework="pt") as file:
                self.routing.update(dict.fromkeys(file.keys(), filename))
        self.device, self.dtype, self.process_group = device, dtype, process_group
        self.bytes_read = 0

    def get_filename(self, tensor_name):
        if tensor_name not in self.routing:
            raise RuntimeError(f"weight {tensor_name} does not exist")
        return str(self.routing[tensor_name]), tensor_name

    def _get_slice(self, tensor_name):
        filename, tensor_name = self.get_filename(tensor_name)
        return Counted(safe_open(filename, framework="pt").get_slice(tensor_name), self)

    def get_tensor(self, tensor_name):
        return self._get_slice(tensor_name)[:].to(device=self.device, dtype=self.dtype)

    def get_sharded(self, tensor_name, dim):
        assert dim == 0
        stored = self._get_slice(tensor_name)
        size = stored.get_shape()[0] // self.process_group.size()
        start = self.process_group.rank() * size
        return stored[start : start + size].to(device=self.device, dtype=self.dtype)


class Counted:
    def __init__(self, stored, owner):
        self.stored, self.owner = stored, owner

    def get_shape(self):
        return self.stored.get_shape()

    def __getitem__(self, index):
        tensor = self.stored[index]
        self.owner.bytes_read += tensor.nbytes
        return tensor


class Checkpoint:
    """Layers of random codes with float16 scales, written in one naming over two files; biases beside them."""

    def __init__(self, folder, shapes, naming, num_bits=4, group_size=128, biases=(), dense=()):
        self.codes, self.scales, self.bias, self.dense = {}, {}, {}, {}
        self.group_size, self.num_bits = group_size, num_bits
        tensors, specs = {}, {}
        for seed, (name, (n, k)) in enumerate(shapes.items()):
            generator = torch.Generator().manual_seed(seed)
            if name in biases:
                self.bias[name] = tensors[f"{name}.bias"] = torch.randn(n, generator=generator).half()
            if name in dense:
                self.dense[name] = tensors[f"{name}.weight"] = (torch.randn(n, k, generator=generator) / k**0.5).half()
                continue
            codes = random_codes(n, k, num_bits, seed)
            groups = 1 if group_size == -1 else k // group_size
            scales = (torch.rand(groups, n, generator=generator) + 0.5).div(2.0 ** (num_bits - 2) * k**0.5).half()
            self.codes[name], self.scales[name] = codes, scales
            if naming == "own":
                layer = SparseMarlinLinear.from_codes(codes, scales, group_size=group_size, num_bits=num_bits)
                made = (layer.weight_packed, layer.scales)
                specs[name] = LayerSpec(k, n, num_bits, group_size)
            else:
                # The compressed-tensors packer leaves the scales of two groups as they are.
                plain = naming == "compressed-tensors" and groups == 2
                made = marlin_24(codes, scales, num_bits, permuted=False if plain else None)
            tensors.update({f"{name}.{key}": each for key, each in zip(NAMINGS[naming], made, strict=True)})
        self.config = CheckpointConfig(specs).to_dict() if naming == "own" else {"quant_method": naming}
        names = sorted(tensors)
        self.files = []
        for index, part in enumerate((names[::2], names[1::2])):  # tensors of a layer are in both files
            self.files.append(folder / f"model-{index}.safetensors")
            save_file({name: tensors[name].contiguous() for name in part}, self.files[-1])
        self.bytes = {name: sum(tensors[f"{name}.{key}"].nbytes for key in NAMINGS[naming]) for name in self.codes}

    def wanted(self, name, dtype, device, rows=slice(None)):
        """Codes, scales and group size for the acceptance rule."""
        return self.codes[name][rows].to(device), self.scales[name][:, rows].to(device, dtype), self.group_size
