"""The published packers of the old formats, from their rule: dense codes in, bytes as they were written out.

Written with numpy from the description of the layouts, one element at a time or with index arrays, and with nothing of
the importer: the tests hold one against the other. K = in features, N = out features, codes int8 [N, K] with 2:4 zeros.
"""

import numpy as np
import torch

# Which two positions of a quad the packers keep, by the mask of non-zero positions (bit i: position i).
KEPT = {
    0b0011: (0, 1), 0b0101: (0, 2), 0b0110: (1, 2), 0b1001: (0, 3), 0b1010: (1, 3), 0b1100: (2, 3),
    0b0000: (2, 3), 0b0001: (0, 2), 0b0010: (1, 2), 0b0100: (2, 3), 0b1000: (2, 3),
}  # fmt: skip


def weight_permutation(num_bits: int) -> np.ndarray:
    """Within 1024 values (16 kept x 64 features): out[i] = in[permutation[i]]."""
    order = []
    for lane in range(32):
        feature_group, c = lane // 4, lane % 4
        start = 256 * (feature_group // 2) + 8 * (feature_group % 2)
        for j in range(4):
            for block in (0, 1):
                for row in (2 * c, 2 * c + 1, 2 * c + 8, 2 * c + 9):
                    order.append(16 * row + start + 4 * block + j)
    interleave = [0, 2, 4, 6, 1, 3, 5, 7] if num_bits == 4 else [0, 2, 1, 3]
    return np.array(order).reshape(-1, len(interleave))[:, interleave].ravel()


def compress(codes: torch.Tensor, kept_by_mask: dict[int, tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Kept codes [N, K / 2] and the metadata nibbles [N, K / 4]."""
    quads = codes.numpy().astype(np.int64).reshape(codes.shape[0], -1, 4)
    mask = ((quads != 0) * np.array([1, 2, 4, 8])).sum(-1)
    first = np.vectorize(lambda m: kept_by_mask[int(m)][0])(mask)
    second = np.vectorize(lambda m: kept_by_mask[int(m)][1])(mask)
    kept = np.stack([np.take_along_axis(quads, i[..., None], -1)[..., 0] for i in (first, second)], -1)
    return kept.reshape(codes.shape[0], -1), first | second << 2


def pack_weight(kept: np.ndarray, num_bits: int) -> torch.Tensor:
    """int32 [K / 32, N * num_bits / 2] from kept codes [N, K / 2]."""
    size_n, size_k = kept.shape[0], kept.shape[1]
    unsigned = (kept + (1 << num_bits - 1)).T
    tiles = unsigned.reshape(size_k // 16, 16, size_n // 16, 16).transpose(0, 2, 1, 3).reshape(size_k // 16, -1)
    permutation = weight_permutation(num_bits)
    mixed = tiles.reshape(-1, 1024)[:, permutation].reshape(tiles.shape)
    per_word = 32 // num_bits
    words = np.zeros((mixed.shape[0], mixed.shape[1] // per_word), dtype=np.uint64)
    for i in range(per_word):
        words |= mixed[:, i::per_word].astype(np.uint64) << np.uint64(num_bits * i)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


def pack_meta(nibbles: np.ndarray) -> torch.Tensor:
    """int16 [K / 32, 2 N] from nibbles [N, K / 4]: values of four nibbles, in interleaved columns."""
    size_n, blocks = nibbles.shape[0], nibbles.shape[1] // 4
    values = (nibbles.reshape(size_n, blocks, 4) << np.array([0, 4, 8, 12])).sum(-1).astype(np.uint16)
    stored = np.zeros((blocks // 2, 2 * size_n), dtype=np.uint16)
    for n in range(size_n):
        row = n // 64 * 64 + n % 2 * 2 + n % 8 // 4 + n % 32 % 4 // 2 * 32 + n % 64 // 8 * 4
        for j in range(blocks):
            r, c = row, j
            if r % 2 == 0 and c % 2 == 1:
                r, c = r + 1, c - 1
            elif r % 2 == 1 and c % 2 == 0:
                r, c = r - 1, c + 1
            stored[c // 2, 2 * r + c % 2] = values[n, j]
    return torch.from_numpy(stored.view(np.int16))


def permute_scales(scales: torch.Tensor) -> torch.Tensor:
    """Scales [G, N] as grouped kernels read them: eight features in the order 0 4 1 5 2 6 3 7."""
    return scales.reshape(scales.shape[0], -1, 8)[:, :, [0, 4, 1, 5, 2, 6, 3, 7]].reshape(scales.shape)


def marlin_24(
    codes: torch.Tensor,
    scales: torch.Tensor,
    num_bits: int,
    *,
    permuted: bool | None = None,
    kept: dict[int, tuple[int, int]] = KEPT,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """packed, meta and scales as the files hold them. Scales [G, N] are permuted where there is more than one group;
    `permuted` says otherwise (the compressed-tensors packer at K = 256)."""
    values, nibbles = compress(codes, kept)
    if permuted is None:
        permuted = scales.shape[0] > 1
    stored = permute_scales(scales) if permuted else scales.clone()
    return pack_weight(values, num_bits), pack_meta(nibbles), stored.to(torch.float16)
