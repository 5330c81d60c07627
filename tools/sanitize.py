"""One small launch of every compiled kernel: `compute-sanitizer --tool memcheck python tools/sanitize.py`."""

import torch

import sparse_marlin
from sparse_marlin import _core, testing


def gemm_kernels() -> int:
    """Every tile, activation type, code width and scale mode, with and without a split, on ragged edges."""
    launches = 0
    n, k, m = 72, 260, 19
    for dtype in (torch.float16, torch.bfloat16):
        for num_bits in _core.NUM_BITS:
            for group_size in (-1, 128, 32):
                codes = testing.random_codes(n, k, num_bits, device="cuda")
                scales = testing.random_scales(n, k, group_size, dtype).cuda()
                packed = sparse_marlin.pack_24_weights(codes, scales, group_size, num_bits)
                assert torch.equal(sparse_marlin.unpack_24_weights(packed, n, k, num_bits), codes)
                a = torch.randn(m, k, device="cuda").to(dtype)
                bias = torch.randn(n, device="cuda").to(dtype)
                for tile in range(len(_core.TILES)):
                    for splits in (1, 2):
                        out = torch.ops.sparse_marlin._sparse_marlin_gemm_tile(
                            a, packed, scales, group_size, num_bits, bias, tile, splits
                        )
                        testing.assert_accepted(out, a, codes, scales, group_size, bias, f"tile {tile}")
                        launches += 1
    return launches


if __name__ == "__main__":
    print(f"{gemm_kernels()} multiplications accepted on {torch.cuda.get_device_name()}")
