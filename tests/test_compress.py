"""compress on whole models: what each layer is calibrated on, what is made of it, masks, fallbacks."""

import copy
import dataclasses

import pytest
import torch
from compress_models import llama, logits, same, tensors, tokens
from torch import nn

import sparse_marlin
from sparse_marlin import SparseMarlinLinear, compress, replace_linears
from sparse_marlin.compress import QUALITIES, layerwise
from sparse_marlin.compress.blocks import find_blocks, shared_inputs
from sparse_marlin.compress.solvers import SOLVERS, magnitude
from sparse_marlin.quantize import prune_24_magnitude
from sparse_marlin.replace import select

pytestmark = pytest.mark.filterwarnings("ignore:compress. calibration")


# --- the result -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_better_than_weight_only(device, dtype):
    if device.type == "cuda" and dtype == torch.float32:
        pytest.skip("GPU kernels take 16-bit activations")
    model = llama(device, dtype, initializer_range=0.06)
    dense = logits(model, tokens(4, seed=2))
    simple, ours = copy.deepcopy(model), model
    replace_linears(simple, group_size=32)
    report = compress(ours, tokens(48), group_size=32)
    assert len(report.converted) == 14
    assert [layer.name for layer in report.skipped] == ["lm_head"]
    assert all(0 < layer.output_error < 1 for layer in report.converted)
    assert "output error" in str(report)
    assert next(ours.parameters()).dtype == dtype
    lost = [float((logits(m, tokens(4, seed=2)) - dense).norm() / dense.norm()) for m in (simple, ours)]
    assert lost[1] < 0.9 * lost[0]


@pytest.mark.parametrize("quality", QUALITIES)
def test_every_quality_converts_a_model(quality):
    model = llama()
    before = tensors(model)
    report = compress(model, tokens(), quality=quality, group_size=32)
    assert report.method == quality
    assert len(report.converted) == 14
    kept = {name: tensor for name, tensor in model.state_dict().items() if name in before}
    assert all(torch.equal(tensor, before[name]) for name, tensor in kept.items())  # norms, embeddings, head
    assert torch.isfinite(logits(model, tokens(2))).all()


def test_eight_bits_lose_less_than_four():
    errors = []
    for num_bits in (4, 8):
        report = compress(llama(), tokens(), num_bits=num_bits, group_size=-1)
        errors.append(report.mean_output_error)
    assert errors[1] < errors[0]


def test_each_layer_is_calibrated_on_what_the_compressed_layers_before_it_produce():
    """H of every group, against hooks on the finished model: the inputs that the layers really see."""
    model, ids = llama(), tokens(6)
    seen = []

    def spy(problem):
        seen.append(problem.hessian.exact)
        return magnitude(problem)

    compress(model, ids, quality=spy, group_size=32)
    wanted, order = {}, []

    def note(name):
        def hook(_, args):
            rows = args[0].reshape(-1, args[0].shape[-1])
            wanted[name] = rows.t() @ rows / len(rows)
            order.append(name)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, SparseMarlinLinear):
            module.register_forward_pre_hook(note(name))
    logits(model, ids)
    groups = [name for name in order if name.rpartition(".")[2] in ("q_proj", "o_proj", "gate_proj", "down_proj")]
    assert len(seen) == len(groups) == 8  # four inputs a block: q, k and v share one, gate and up another
    for name, hessian in zip(groups, seen, strict=True):
        torch.testing.assert_close(
            hessian, wanted[name], rtol=2e-3, atol=2e-3 * float(wanted[name].abs().max()), msg=name
        )


def inputs_of(model, kinds, ids):
    """X [T, K] of the linears whose names end in one of `kinds`, in the order of the forward."""
    seen, handles = [], []
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in kinds:
            handles.append(
                module.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1])))
            )
    logits(model, ids)
    for handle in handles:
        handle.remove()
    return seen


def test_the_default_quality_aims_at_what_the_dense_model_returns(monkeypatch):
    """The target of every group, against the least-squares weights from the inputs of both models."""
    model, ids = llama(), tokens(128)
    first = ("q_proj", "o_proj", "gate_proj", "down_proj")
    dense = inputs_of(model, first, ids)
    problems = []

    def spy(problem):
        problems.append(problem)
        return magnitude(dataclasses.replace(problem, step=lambda _: None))

    monkeypatch.setitem(SOLVERS, "joint", spy)
    weights = {n: m.weight.detach().clone() for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    compress(model, ids, group_size=32)
    ours = inputs_of(model, first, ids)
    assert len(problems) == len(dense) == len(ours) == 8
    groups = [("self_attn", "qkv"), ("self_attn", "o"), ("mlp", ("gate", "up")), ("mlp", ("down",))]
    for index, (problem, x, given) in enumerate(zip(problems, dense, ours, strict=True)):
        part, kinds = groups[index % 4]
        weight = torch.cat([weights[f"model.layers.{index // 4}.{part}.{kind}_proj"] for kind in kinds])
        # min over V of |V X^ - W X|^2 / tokens + damping |V - W|^2
        damping = problem.hessian.damping * problem.hessian.exact.diagonal().mean()
        normal = given.t() @ given / len(given) + damping * torch.eye(given.shape[1])
        wanted = torch.linalg.solve(normal, (given.t() @ x / len(x) + damping * torch.eye(given.shape[1])) @ weight.t())
        torch.testing.assert_close(problem.target, wanted, rtol=2e-3, atol=2e-3 * float(wanted.abs().max()))
        if index == 0:
            torch.testing.assert_close(problem.target, weight.t(), rtol=1e-4, atol=1e-5)


def test_following_the_dense_model_brings_the_output_nearer(monkeypatch):
    ids, other = tokens(128), tokens(16, seed=5)
    wanted = logits(llama(layers=4, initializer_range=0.1), other)
    lost = {}
    for share in (0.0, layerwise.FOLLOW):
        monkeypatch.setattr(layerwise, "FOLLOW", share)
        model = llama(layers=4, initializer_range=0.1)
        compress(model, ids, group_size=32)
        lost[share] = float((logits(model, other) - wanted).norm() / wanted.norm())
    assert lost[layerwise.FOLLOW] < 0.95 * lost[0.0]


def test_tokens_that_are_routed_elsewhere_are_not_compared():
    """Experts that see other tokens in the compressed model than in the dense one are fitted without it."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(32, 2)
            self.experts = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32)])

        def forward(self, x):
            choice, out = self.gate(x).argmax(-1), torch.zeros_like(x)
            for index, expert in enumerate(self.experts):
                out[choice == index] = expert(x[choice == index])
            return x + out

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.blocks = nn.Embedding(40, 32), nn.ModuleList([Block(), Block()])

        def forward(self, ids):
            x = self.embed(ids)
            for block in self.blocks:
                x = block(x)
            return x

    torch.manual_seed(0)
    report = compress(Net(), torch.randint(0, 40, (64, 8)), group_size=32)
    assert len(report.converted) == 6
    assert all(0 < layer.output_error < 1 for layer in report.converted)


def test_what_is_kept_inside_a_block_saves_work_and_changes_nothing(monkeypatch):
    found, counts = [], []
    for limit in (0, 10**9):
        monkeypatch.setattr(layerwise, "_KEEP_INSIDE_BYTES", limit)
        model, calls = llama(), []
        for block in model.model.layers:
            block.self_attn.register_forward_pre_hook(lambda *_, seen=calls: seen.append(1))
            block.mlp.act_fn.register_forward_pre_hook(lambda *_, seen=calls: seen.append(1))
        compress(model, tokens(), group_size=32)
        found.append(tensors(model))
        counts.append(len(calls))
    assert same(*found)
    assert counts[1] < counts[0]


def test_blocks_after_the_last_compressed_one_are_not_run():
    model, calls = llama(layers=3), []
    model.model.layers[2].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    report = compress(model, tokens(), group_size=32, ignore=["lm_head", r"re:.*layers\.[12]\..*"])
    assert len(report.converted) == 7
    assert not calls


def test_correction_lowers_the_error_and_belongs_to_the_layer():
    plain, corrected = llama(), llama()
    without = compress(plain, tokens(), group_size=32)
    report = compress(corrected, tokens(), group_size=32, rank=8)
    assert report.mean_output_error < 0.85 * without.mean_output_error
    assert "rank 8" in report.method
    of = {row.name: row.bytes_after for row in report}, {row.name: row.bytes_after for row in without}
    # `down`, and packed 64 rows and 128 columns, 3 bits each, with a scale for every 32 columns
    extra = 4 * 8 * 64 + 64 * 128 * 3 // 8 + 4 * 4 * 64
    assert of[0]["model.layers.0.self_attn.q_proj"] == of[1]["model.layers.0.self_attn.q_proj"] + extra
    # 100 outputs: no multiple of 8, which kernels need where it is packed
    extra = 4 * 8 * (100 + 64)
    assert of[0]["model.layers.0.mlp.up_proj"] == of[1]["model.layers.0.mlp.up_proj"] + extra
    for layer, n in ((corrected.model.layers[0].self_attn.q_proj, 64), (corrected.model.layers[0].mlp.up_proj, 100)):
        up, down = layer.correction()
        assert (tuple(up.shape), tuple(down.shape), layer.packed_correction) == ((n, 8), (8, 64), n == 64)
    # The reported error is that of what the layer computes.
    x = torch.randn(50, 64)
    torch.testing.assert_close(layer(x), layer.to_linear()(x), rtol=1e-3, atol=1e-3)


def test_a_shared_correction_can_be_merged():
    settings = {"intermediate_size": 128, "num_key_value_heads": 4}
    own, shared = llama(**settings), llama(**settings)
    first = compress(own, tokens(), group_size=32, rank=8)
    report = compress(shared, tokens(), group_size=32, rank=8, shared_correction=True, scale_dtype=torch.bfloat16)
    assert "shared correction of rank 8" in report.method
    assert first.mean_output_error < report.mean_output_error < 1.5 * first.mean_output_error
    layer = shared.model.layers[1]
    attention, mlp = layer.self_attn, layer.mlp
    for group in ((attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)):
        assert all(torch.equal(one.correction_down, group[0].correction_down) for one in group)
        assert not torch.equal(group[0].correction_up[:1], group[1].correction_up[:1])
    assert not torch.equal(attention.q_proj.correction_down, mlp.up_proj.correction_down)
    ids = tokens(2)
    wanted = logits(shared.to(torch.bfloat16), ids)
    groups = sparse_marlin.merge_linears(shared, lambda: shared(ids))
    assert [len(group) for group in groups] == [3, 2] * 2
    torch.testing.assert_close(logits(shared, ids), wanted, rtol=0.05, atol=0.05)
    assert sparse_marlin.merge_linears(own, lambda: own(ids)) == []


def test_sixteen_bit_scales_survive_a_change_of_dtype():
    model = llama()
    compress(model, tokens(), group_size=32, rank=8, scale_dtype=torch.bfloat16)
    kinds = set()
    for module in model.modules():
        if isinstance(module, SparseMarlinLinear):
            kinds.add(module.packed_correction)
            for tensor in module.buffers():
                assert tensor.dtype == torch.int32 or torch.equal(tensor, tensor.bfloat16().float())
    assert kinds == {False, True}


def test_a_model_without_blocks_is_one_block():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(40, 32)
            self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

        def forward(self, ids):
            x = self.embed(ids)
            return x + self.down(torch.relu(self.up(x)))

    torch.manual_seed(0)
    report = compress(Net(), torch.randint(0, 40, (16, 8)), group_size=32)
    assert [layer.converted for layer in report] == [True, True]


def test_linears_outside_the_blocks_stay_dense():
    model = llama()
    model.score = nn.Linear(64, 4)
    report = compress(model, tokens(), group_size=32)
    assert {layer.name: layer.reason for layer in report.skipped} == {
        "lm_head": "ignored by 'lm_head'",
        "score": "outside the blocks model.layers.0 to model.layers.1",
    }


def test_an_unused_linear_stays_dense():
    model = llama()
    model.model.layers[1].spare = nn.Linear(64, 64)
    report = compress(model, tokens(), group_size=32)
    reasons = {layer.name: layer.reason for layer in report.skipped}
    assert reasons["model.layers.1.spare"] == "no calibration token reached it"


def test_training_mode_and_hooks_are_as_before():
    model = llama().train()
    model.model.layers[0].eval()
    compress(model, tokens(), group_size=32)
    assert model.training
    assert model.model.layers[1].mlp.up_proj.training
    assert not model.model.layers[0].mlp.up_proj.training
    assert all("forward" not in vars(module) for module in model.modules())


def test_groups_are_found_by_the_forward_itself():
    model = llama()
    blocks, _ = find_blocks(model, select(model, group_size=32, num_bits=4).chosen)
    assert [block.name for block in blocks] == ["model.layers.0", "model.layers.1"]
    hidden = torch.randn(1, 5, 64)
    call = layerwise.Call(kwargs={"position_embeddings": model.model.rotary_emb(hidden, torch.arange(5)[None])})
    groups = shared_inputs(blocks[0], hidden, call)
    kinds = [[candidate.name.rpartition(".")[2] for candidate in group.linears] for group in groups]
    assert kinds == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


# --- patterns, fallbacks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quality", ["sparsegpt", "joint"])
def test_masks_from_outside_and_of_the_weights_themselves(quality):
    model = llama()
    names = [f"model.layers.{i}.mlp.{kind}_proj" for i in (0, 1) for kind in ("up", "down")]
    masks = {f"{name}.weight": prune_24_magnitude(torch.randn_like(model.get_submodule(name).weight)) for name in names}
    compress(model, tokens(), group_size=32, quality=quality, masks=masks)
    for name in names:
        assert not model.get_submodule(name).codes()[~masks[f"{name}.weight"]].any()
    pruned = llama()
    patterns = {}
    for name, module in pruned.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            patterns[name] = prune_24_magnitude(module.weight)
            module.weight.data *= patterns[name]
    report = compress(pruned, tokens(), group_size=32, quality=quality, masks="nonzero")
    assert report.mean_output_error < 0.15  # only rounding is lost
    for name, pattern in patterns.items():
        assert not pruned.get_submodule(name).codes()[~pattern].any()


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"model.layers.7.up": torch.ones(4, 4)}, "names of linears that are converted, got 'model.layers.7.up'"),
        ({"model.layers.0.mlp.up_proj": torch.ones(4, 4)}, r"up_proj: mask: expected \[100, 64\]"),
        (
            {"model.layers.0.mlp.up_proj": torch.ones(100, 64)},
            "at most 2 non-zero of every 4, got 4 at row 0, columns 0",
        ),
        ("nonzero", "q_proj: weight: expected at most 2 non-zero of every 4"),
        ("zero", "expected a mapping or 'nonzero'"),
    ],
)
def test_masks_that_do_not_fit(masks, message):
    with pytest.raises(ValueError, match=message):
        compress(llama(), tokens(), group_size=32, masks=masks)


@pytest.mark.parametrize("fallback", ["dense", "int4"])
def test_layers_over_the_error_limit(fallback):
    model = llama()
    before = tensors(model)
    errors = sorted(layer.output_error for layer in compress(llama(), tokens(), group_size=32).converted)
    limit = errors[5]
    report = compress(model, tokens(), group_size=32, max_error=limit, fallback=fallback)
    over = [layer for layer in report.skipped if layer.name != "lm_head"]
    assert 0 < len(over) < 14
    for layer in over:
        assert layer.reason.startswith("output error 0.")
        module = model.get_submodule(layer.name)
        assert type(module) is nn.Linear
        unchanged = torch.equal(module.weight, before[f"{layer.name}.weight"])
        assert unchanged == (fallback == "dense")
        if fallback == "int4":
            assert "rounded to 4 bits without pruning" in layer.reason
            assert 0 < layer.output_error < limit
            values = module.weight[0, :32].unique()
            assert len(values) <= 16
