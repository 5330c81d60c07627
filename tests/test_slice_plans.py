"""What tensor parallelism does to the planner's choices, by its own prediction for an H100 (no GPU needed)."""

import pytest
import slice_plans

PREDICTIONS = list(slice_plans.predictions())


def name(prediction):
    return f"{prediction.what.name}, {prediction.tokens} tokens"


def test_a_slice_keeps_the_fraction_of_the_floor_or_the_reason_is_known():
    """The reasons (docs/TENSOR_PARALLEL.md) are of the hardware; anything else is the planner's fault."""
    unexplained = {name(each): each.ratio for each in PREDICTIONS if each.reason is None}
    assert not unexplained


@pytest.mark.parametrize("model", ["70B", "405B"])
def test_two_ranks_decode_at_the_whole_layers_fraction(model):
    """What the largest linears of a large model, cut in two, must reach without excuse."""
    found = [
        each
        for each in PREDICTIONS
        if each.what.model == model
        and each.what.world_size == 2
        and each.what.linear in ("gate_up", "down")
        and each.tokens <= 64
    ]
    assert len(found) == 10
    assert {name(each): each.ratio for each in found if each.ratio < slice_plans.LIMIT} == {}


def test_slices_are_those_that_sharding_makes():
    """The sizes assumed here are the ones that the sharding plan gives."""
    from sparse_marlin import SparseMarlinLinear, _core
    from sparse_marlin.shard_plan import split_layer

    for part, whole in slice_plans.slices():
        layer = SparseMarlinLinear(whole.k, whole.n, device="meta", group_size=slice_plans.GROUP_SIZE)
        sizes = {stop - start for start, stop in split_layer(layer, part.world_size, part.column)}
        size = part.n if part.column else part.k
        unit = _core.TILE_ROWS if part.column else _core.TILE_COLS
        assert max(sizes) - size < unit, part.name  # equal, or one tile more on some ranks
