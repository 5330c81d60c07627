"""Which part of every layer a rank holds: plans alone, no process."""

import itertools

import pytest
import torch
from distributed_helpers import tiny_llama
from test_parallel import tiny_dense
from torch import nn

from sparse_marlin import SparseMarlinLinear
from sparse_marlin.shard_plan import make_plan, split_evenly, split_heads, split_layer

pytest.importorskip("transformers")


@pytest.mark.parametrize(("size", "unit"), [(1, 1), (640, 128), (641, 128), (96, 32), (7, 2)])
def test_even_splits_cover_everything_once(size, unit):
    for world_size in range(1, -(-size // unit) + 1):
        ranges = split_evenly(size, world_size, unit)
        assert ranges[0][0] == 0
        assert ranges[-1][1] == size
        assert all(first[1] == second[0] for first, second in itertools.pairwise(ranges))
        assert all(start < stop and start % unit == 0 for start, stop in ranges)
        assert max(b - a for a, b in ranges) - min(b - a for a, b in ranges[:-1] or ranges) <= unit
    with pytest.raises(ValueError, match="expected at least"):
        split_evenly(size, -(-size // unit) + 1, unit)


@pytest.mark.parametrize(("heads", "kv"), [(32, 8), (9, 3), (8, 8), (8, 1), (12, 4), (6, 2)])
def test_every_query_head_is_with_its_key_head(heads, kv):
    readers = heads // kv
    for world_size in range(1, heads + 1):
        shares = split_heads(heads, kv, world_size)
        assert len(shares) == world_size
        assert [q for share in shares for q in range(*share[0])] == list(range(heads))
        for (first, last), (first_kv, last_kv) in shares:
            local = (last - first) // (last_kv - first_kv)
            for query in range(first, last):
                assert query // readers == first_kv + (query - first) // local


def test_cuts_fall_on_tiles_and_groups_where_there_are_enough_of_them():
    layer = SparseMarlinLinear(1024, 1000, device="meta", group_size=256)
    assert split_layer(layer, 2, True) == ((0, 512), (512, 1000))
    assert split_layer(layer, 3, False) == ((0, 512), (512, 768), (768, 1024))
    assert all(start % 128 == 0 for start, _ in split_layer(layer, 8, False))  # finer groups instead of idle ranks
    assert all(start % 32 == 0 for start, _ in split_layer(layer, 32, False))
    with pytest.raises(ValueError, match="too few for 33 ranks"):
        split_layer(layer, 33, False)
    channelwise = SparseMarlinLinear(40, 40, device="meta", group_size=-1)
    assert all(start % 4 == 0 for start, _ in split_layer(channelwise, 10, False))


def meta_llama(**changes):
    with torch.device("meta"):
        return tiny_dense(**changes)


def test_the_models_own_plan_is_followed():
    plan = make_plan(meta_llama(tie_word_embeddings=False), 2)
    cuts = {name.rpartition(".")[2]: cut for name, cut in plan.cuts.items()}
    assert {name for name, cut in cuts.items() if cut.column} == {
        "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head"
    }  # fmt: skip
    assert {name for name, cut in cuts.items() if cut.whole} == {"lm_head"}
    assert plan.heads == {"model.layers.0.self_attn": ((2, 1), (2, 1))}
    assert cuts["k_proj"].ranges == ((0, 64), (64, 128))
    assert not plan.reasons


def test_what_cannot_be_cut_stays_whole_with_the_reason():
    tied = make_plan(meta_llama(tie_word_embeddings=True), 2)
    assert "shared with another module" in tied.reasons["lm_head"]
    heads = make_plan(meta_llama(), 5)
    assert "4 query heads are too few for 5 ranks" in heads.reasons["model.layers.0.self_attn.o_proj"]
    assert "model.layers.0.mlp.up_proj" in heads.cuts
    model = tiny_llama(layers=1, hidden_size=80, head_dim=20, group_size=32)
    odd = make_plan(model, 4)
    assert "heads of 20 features cannot be cut into scale groups" in odd.reasons["model.layers.0.self_attn.q_proj"]
    assert "down_proj" in "".join(odd.cuts)
    with pytest.raises(ValueError, match="expected a transformers model with a tensor-parallel plan"):
        make_plan(nn.Sequential(nn.Linear(8, 8)), 2)
