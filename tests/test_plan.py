"""The planner, without a GPU: invariants over a grid of problems and devices, and the text of explain()."""

import ast
import itertools
from pathlib import Path

import pytest

from sparse_marlin import _core

KIB = 1024
DEVICES = {
    "A100": _core.Device(80, 108, 163 * KIB, 164 * KIB, 40 << 20),
    "RTX A6000": _core.Device(86, 84, 99 * KIB, 100 * KIB, 6 << 20),
    "RTX 4090": _core.Device(89, 128, 99 * KIB, 100 * KIB, 72 << 20),
    "H100": _core.Device(90, 132, 227 * KIB, 228 * KIB, 50 << 20),
    "B200": _core.Device(100, 148, 227 * KIB, 228 * KIB, 126 << 20),
    "RTX 5090": _core.Device(120, 170, 99 * KIB, 100 * KIB, 96 << 20),
}
TOKENS = [1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 64, 65, 100, 128, 200, 256, 512, 1000, 4096, 65536]
WEIGHTS = [
    (1, 4),
    (7, 36),
    (192, 576),
    (1536, 576),
    (4096, 4096),
    (28672, 4096),
    (4096, 14336),
    (57344, 8192),
    (1, 65536),
]


def problems():
    for n, k in WEIGHTS:
        for m in TOKENS:
            for group_size in _core.GROUP_SIZES:
                for num_bits in _core.NUM_BITS:
                    yield _core.Problem(m, n, k, group_size, num_bits)


def test_launches_with_no_more_blocks_than_sms_are_spread():
    spread = [_core.plan(problem, DEVICES["H100"]) for problem in problems()]
    assert {plan.spread for plan in spread} == {True, False}
    assert all(plan.spread == (plan.grid <= DEVICES["H100"].num_sms) for plan in spread)
    assert not any(_core.plan(problem, DEVICES["A100"]).spread for problem in problems())


@pytest.mark.parametrize("name", DEVICES)
def test_every_plan_can_run(name):
    device = DEVICES[name]
    for problem in problems():
        plan = _core.plan(problem, device)
        tile = _core.TILES[plan.tile]
        text = f"{name}: {problem.m} x {problem.n} x {problem.k}, group {problem.group_size}, {problem.num_bits} bits"
        tiles = -(-problem.m // tile.block_m) * -(-problem.n // (tile.block_n * tile.share))
        if plan.splits < 0:  # stream-K
            assert tile.kernel == "sm90", text
            assert tile.share == 1, text
            assert -plan.splits <= tile.blocks, text
            assert 1 <= plan.grid <= device.num_sms * -plan.splits, text
            assert plan.workspace_bytes >= 4 * plan.grid * tile.block_m * tile.block_n, text
            continue
        if tile.kernel != "sm80" and plan.splits == tile.teams == 1:  # persistent: at most what the GPU holds at once
            tiles = min(tiles, device.num_sms * tile.blocks // tile.share)
        assert plan.grid == tiles * tile.share * plan.splits, text
        assert tile.share * plan.splits <= {"sm80": 16, "sm90": 8, "decode": 8}[tile.kernel], text
        assert 1 <= plan.splits <= -(-problem.k // _core.TILE_COLS), text
        assert plan.num_stages >= 2, text
        assert plan.smem_bytes <= device.smem_per_block, text
        assert plan.threads == tile.threads <= 1024, text
        assert plan.predicted_us > 0, text
        partials = 4 * plan.splits * problem.m * problem.n if plan.splits > 1 and tile.kernel == "sm80" else 0
        assert plan.workspace_bytes >= partials, text


def test_the_plan_is_the_candidate_predicted_fastest():
    device = DEVICES["H100"]
    for problem in [_core.Problem(m, 6144, 4096) for m in TOKENS]:
        best = _core.plan(problem, device)
        for tile, chosen in enumerate(_core.TILES):
            if not _core.may_share(problem, device, tile):  # the planner leaves it out
                continue
            for splits in (-2, -1, 1, 2, 3, 4, 6, 8, 12, 16):
                try:
                    other = _core.plan_with_tile(problem, device, tile, splits)
                except ValueError:
                    continue
                blocks = -(-problem.m // chosen.block_m) * -(-problem.n // chosen.block_n) * splits
                if splits <= 1 or blocks <= 8 * device.num_sms:  # beyond that splits are not considered
                    assert best.predicted_us <= other.predicted_us


def test_activations_are_shared_where_a_block_has_much_to_do():
    device = DEVICES["H100"]
    shared = [i for i, tile in enumerate(_core.TILES) if tile.share > 1]
    few, many = _core.Problem(16, 8192, 4096), _core.Problem(4096, 28672, 4096)
    text = "rejected, activations are not shared by blocks with so little to do"
    assert _core.explain(few, device).count(text) == len(shared)
    assert "activations are not shared" not in _core.explain(many, device)
    assert _core.plan(many, device).tile in shared
    assert _core.plan_with_tile(few, device, shared[0]).predicted_us > 0  # who asks for it gets it
    assert "activations are not shared" not in _core.explain(few, DEVICES["A100"])

    wide = next(i for i in shared if (_core.TILES[i].block_m, _core.TILES[i].block_n) == (128, 256))
    for m, n, k, allowed in [
        (384, 44 * 256, 96 * 128, False),  # a block for each of 132 SMs, 96 column tiles
        (384, 44 * 256, 96 * 128 + 4, True),
        (384, 44 * 256 + 8, 48 * 128, False),  # two rounds
        (384, 44 * 256 + 8, 49 * 128, True),
        (256, 44 * 256, 512 * 128, False),
        (1025, 512, 128, True),
    ]:
        assert _core.may_share(_core.Problem(m, n, k), device, wide) is allowed
        assert _core.may_share(_core.Problem(m, n, k), device, wide - 1)


def test_planning_is_pure():
    problem, device = _core.Problem(100, 4096, 4096), DEVICES["A100"]
    first, second = _core.plan(problem, device), _core.plan(problem, device)
    for field in ("tile", "splits", "num_stages", "grid", "smem_bytes", "workspace_bytes", "predicted_us"):
        assert getattr(first, field) == getattr(second, field)


def test_more_work_is_never_predicted_to_be_faster_by_much():
    # Choosing among the same tiles, more tokens or features cannot help; waves leave room for a little.
    for device in DEVICES.values():
        times = [
            _core.plan(_core.Problem(m, 4096, 4096), device).predicted_us for m in (1, 16, 64, 256, 1024, 4096, 16384)
        ]
        assert all(later >= 0.99 * earlier for earlier, later in itertools.pairwise(times))


def test_few_tokens_take_small_tiles_and_many_take_large_ones():
    device = DEVICES["H100"]
    assert _core.TILES[_core.plan(_core.Problem(1, 4096, 4096), device).tile].block_m == 8
    assert _core.TILES[_core.plan(_core.Problem(4096, 4096, 4096), device).tile].block_m >= 128


def test_only_hopper_with_its_native_code_gets_the_hopper_kernel():
    problem, few = _core.Problem(4096, 4096, 4096), _core.Problem(8, 4096, 14336)
    without = _core.Device(90, 132, 227 * KIB, 228 * KIB, 50 << 20, hopper_kernels=False)
    for name, device in {**DEVICES, "H100 without": without}.items():
        hopper = name == "H100"
        assert _core.TILES[_core.plan(problem, device).tile].kernel == ("sm90" if hopper else "sm80"), name
        assert _core.TILES[_core.plan(few, device).tile].kernel == ("decode" if hopper else "sm80"), name
    assert "native code for 9.0a" in _core.explain(problem, without)
    assert "needs compute capability 9.0" in _core.explain(problem, DEVICES["A100"])


def test_small_shared_memory_rejects_large_stages_with_the_reason():
    text = _core.explain(_core.Problem(64, 4096, 4096), DEVICES["RTX 4090"])
    assert "rejected, needs" in text
    assert "B of shared memory" in text
    assert text.count(" * ") == 1, text


def test_explain_names_problem_device_and_every_tile():
    text = _core.explain(_core.Problem(5, 192, 576, group_size=64, num_bits=8, dtype="bfloat16"), DEVICES["H100"])
    assert "m=5 n=192 k=576 group_size=64 num_bits=8 bfloat16" in text
    assert "compute capability 9.0, 132 SMs" in text
    assert len(text.strip().splitlines()) == 2 + len(_core.TILES)


@pytest.mark.parametrize(
    ("problem", "device", "message"),
    [
        (_core.Problem(1, 64, 64), _core.Device(75, 68, 64 * KIB, 64 * KIB, 4 << 20), "8.0 or higher, got 7.5"),
        (_core.Problem(1, 64, 64, dtype="float32"), DEVICES["H100"], "float16 or bfloat16"),
        (_core.Problem(1, 64, 66), DEVICES["H100"], "multiple of 4"),
        (_core.Problem(1, 0, 64), DEVICES["H100"], "out features"),
        (_core.Problem(-1, 64, 64), DEVICES["H100"], "tokens"),
    ],
)
def test_what_cannot_run_says_why(problem, device, message):
    assert message in _core.why_unsupported(problem, device)
    with pytest.raises(ValueError, match="expected"):
        _core.plan(problem, device)
    assert "not supported" in _core.explain(problem, device)


def test_a_forced_tile_must_exist_and_fit():
    problem = _core.Problem(1, 64, 128)
    with pytest.raises(ValueError, match="tile: expected 0 to"):
        _core.plan_with_tile(problem, DEVICES["H100"], len(_core.TILES), 1)
    with pytest.raises(ValueError, match="more splits than"):
        _core.plan_with_tile(problem, DEVICES["H100"], 0, 2)
    with pytest.raises(ValueError, match="does stream-K"):
        _core.plan_with_tile(problem, DEVICES["H100"], 0, -1)
    sm90 = next(i for i, tile in enumerate(_core.TILES) if tile.kernel == "sm90" and tile.blocks == 1)
    with pytest.raises(ValueError, match="stream-K with 2 blocks an SM, which holds 1"):
        _core.plan_with_tile(problem, DEVICES["H100"], sm90, -2)


def test_stream_k_fills_the_last_round():
    """112 tiles of 128 x 256 leave 20 of 132 SMs idle; with equal ranges none is."""
    tile = next(i for i, t in enumerate(_core.TILES) if (t.kernel, t.block_m, t.block_n) == ("sm90", 128, 256))
    device, problem = DEVICES["H100"], _core.Problem(128, 28672, 4096)
    whole, streamed = (_core.plan_with_tile(problem, device, tile, splits) for splits in (1, -1))
    assert (whole.grid, streamed.grid) == (112, 132)
    efforts = [_core.effort(problem, device, plan) for plan in (whole, streamed)]
    assert [(effort.turns, effort.range_turns) for effort in efforts] == [(32, 0), (0, 28)]
    assert "stream-K" in _core.explain(_core.Problem(512, 28672, 4096), device)


def test_the_stub_has_every_field():
    """Type checkers see `_core.pyi` alone."""
    stub = Path(__file__).resolve().parent.parent / "python" / "sparse_marlin" / "_core.pyi"
    classes = [node for node in ast.parse(stub.read_text()).body if isinstance(node, ast.ClassDef)]
    assert {"Problem", "Device", "Effort", "Plan", "Tile"} <= {node.name for node in classes}
    for node in classes:
        written = {each.name for each in node.body if isinstance(each, ast.FunctionDef) and each.name != "__init__"}
        made = {name for name, each in vars(getattr(_core, node.name)).items() if isinstance(each, property)}
        assert written == made, node.name
