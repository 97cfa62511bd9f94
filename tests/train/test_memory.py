"""Memory: estimates against what a step really takes, and the micro-batch that fits."""

import contextlib

import pytest
import torch
from paths import ROOT
from training_helpers import tiny_model

from gpt.errors import InputError
from gpt.model import GPT, REFERENCE, ModelConfig, Ops, hidden_parameters
from gpt.train import memory
from gpt.train.freeze import freeze
from gpt.train.lora import LoraConfig, add_adapters
from gpt.train.memory import Method
from gpt.train.optim import OptimConfig, make_optimizer
from gpt.train.recompute import recomputed

CPU = torch.device("cpu")
MUON, LESS = Method("muon"), Method(checkpoint_activations=True)

# ---- estimates


METHODS = {
    "adamw": Method(),
    "muon": MUON,
    "lora": Method(lora=LoraConfig(lora_rank=8, lora_targets="c_attn,mlp.c_proj")),
    "freeze": Method(freeze="wpe,h.1.*,*.mlp"),
    "freeze-muon": Method("muon", freeze="wte,h.0"),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("vocab_size", [257, 50257])
def test_the_estimate_of_weights_and_optimizer_is_what_they_take(vocab_size, name):
    config, method = ModelConfig(n_layer=3, n_head=4, n_embd=64, block_size=32), METHODS[name]
    model = GPT(config, vocab_size)
    add_adapters(model, method.lora)
    freeze(model, method.freeze)
    optimizer = make_optimizer(model, OptimConfig(optimizer=method.optimizer))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(torch.zeros(()))
    needs = memory.estimate(config, vocab_size, 1, torch.float32, CPU, method)
    state = sum(v.numel() * 4 for s in optimizer.state.values() for v in s.values())
    assert needs["weights"] == pytest.approx(sum(p.numel() * 4 for p in model.parameters()), rel=0.1)
    assert needs["gradients"] == pytest.approx(sum(p.numel() * 4 for p in trained), rel=0.1)
    assert needs["optimizer"] == pytest.approx(state, rel=0.1)


def measured(model, ids, dtype, ops=REFERENCE):
    """Bytes that a forward pass keeps for the backward pass, weights not counted."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = (tensor, tensor.untyped_storage().nbytes())
        return tensor

    precision = torch.autocast("cpu", dtype) if dtype != torch.float32 else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), precision:
        loss = model(ids, ids, ops=ops).sum()
    assert loss.requires_grad
    return sum(size for _, size in kept.values())


SHAPES = [  # n_layer, n_head, n_embd, block_size, vocab_size, rows
    (2, 4, 64, 128, 257, 4),
    (6, 4, 128, 64, 257, 4),
    (2, 2, 32, 64, 8192, 4),
    (2, 12, 48, 512, 257, 1),  # much attention
    (1, 1, 16, 16, 257, 1),
]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_kept_for_the_backward_pass_is_estimated_to_a_tenth(shape, dtype, dropout):
    *sizes, vocab_size, rows = shape
    config = ModelConfig(*sizes, dropout=dropout)
    kept = measured(GPT(config, vocab_size), torch.zeros(rows, config.block_size, dtype=torch.int64), dtype)
    assert memory.kept_for_backward(config, vocab_size, rows, dtype, CPU) == pytest.approx(kept, rel=0.1)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("targets", ["c_attn,c_proj,c_fc", "c_attn", "mlp.c_proj,attn.c_proj"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_with_adapters_is_estimated_to_a_tenth(dtype, targets, dropout):
    config, lora = ModelConfig(6, 4, 128, 64), LoraConfig(lora_rank=8, lora_dropout=dropout, lora_targets=targets)
    model = GPT(config, 257)
    add_adapters(model, lora)
    kept = measured(model, torch.zeros(4, 64, dtype=torch.int64), dtype)
    expected = memory.kept_for_backward(config, 257, 4, dtype, CPU, Method(lora=lora))
    assert expected == pytest.approx(kept, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_with_checkpointed_activations_is_estimated_to_a_tenth(dtype):
    config = ModelConfig(12, 4, 128, 64, dropout=0.1)
    kept = measured(GPT(config, 257), torch.zeros(4, 64, dtype=torch.int64), dtype, Ops(block=recomputed))
    casts = 2 * hidden_parameters(config) if dtype == torch.bfloat16 else 0  # of weights, which autocast keeps
    assert memory.kept_for_backward(config, 257, 4, dtype, CPU, LESS) == pytest.approx(kept + casts, rel=0.1)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_activations_are_what_is_kept_and_what_passes(dropout):
    config = ModelConfig(2, 4, 64, 128, dropout)
    kept = memory.kept_for_backward(config, 257, 3, torch.float32, CPU)
    passing = memory.estimate(config, 257, 3, torch.float32, CPU)["activations"] - kept
    assert passing == (3 * 128 * 4 * 4 * 128 if dropout else 0)


def test_on_a_gpu_attention_keeps_no_scores_whatever_the_dropout():
    sizes = {}
    for name in ("cpu", "cuda", "mps"):
        for dropout in (0.0, 0.1):
            config = ModelConfig(2, 12, 48, 512, dropout)
            sizes[name, dropout] = memory.kept_for_backward(config, 257, 1, torch.float32, torch.device(name))
    assert sizes["cuda", 0.1] < 1.1 * sizes["cuda", 0.0] == 1.1 * sizes["cpu", 0.0]
    assert sizes["mps", 0.1] == sizes["cpu", 0.1] > 10 * sizes["cpu", 0.0]


# ---- choices


@pytest.mark.parametrize("method", [Method(), MUON, LESS], ids=("adamw", "muon", "less"))
def test_the_chosen_micro_batch_is_the_largest_divisor_that_fits(monkeypatch, method):
    config = ModelConfig(2, 2, 32, 64)
    size = {n: sum(memory.estimate(config, 257, n, torch.float32, CPU, method).values()) for n in (1, 2, 3, 4, 6, 12)}
    for n in size:
        monkeypatch.setattr(memory, "free_memory", lambda _, n=n: size[n] / memory.USABLE + 1)
        assert memory.choose_micro_batch(config, 257, 12, torch.float32, CPU, method=method) == n
        assert memory.choose_micro_batch(config, 257, n, torch.float32, CPU, sharers=2, method=method) < max(n, 2)
    monkeypatch.setattr(memory, "free_memory", lambda _: 0)
    assert memory.choose_micro_batch(config, 257, 12, torch.float32, CPU) == 1


@pytest.mark.parametrize(
    ("device", "examples", "tokens"),
    [
        ("cpu", False, 4096),
        ("cpu", True, 1024),
        ("cuda", False, 32_768),
        ("cuda", True, 32_768),
        ("mps", True, 1 << 17),
    ],
)
def test_a_micro_batch_has_no_more_tokens_than_gain_anything(monkeypatch, device, examples, tokens):
    monkeypatch.setattr(memory, "free_memory", lambda _: 10**15)
    for context in (64, 96, 1024):
        config, batch = ModelConfig(2, 2, 32, context), (1 << 17) // context
        place = torch.bfloat16, torch.device(device)
        found = memory.choose_micro_batch(config, 50257, batch, *place, examples=examples)
        assert found == max(n for n in range(1, batch + 1) if batch % n == 0 and n * context <= tokens)
    one = memory.choose_micro_batch(ModelConfig(2, 2, 32, 1 << 16), 50257, 8, torch.bfloat16, torch.device(device))
    assert one == (1 if device != "mps" else 8)  # longer than the limit


def test_with_dropout_on_a_cpu_a_smaller_micro_batch_fits(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda _: 2 * memory.GIB)
    chosen = [
        memory.choose_micro_batch(ModelConfig(6, 6, 384, 1024, dropout), 257, 8, torch.float32, CPU)
        for dropout in (0.0, 0.1)
    ]
    assert chosen[0] > chosen[1]


def test_the_memory_line_adds_up_and_names_its_unit():
    needs = {
        "weights": memory.GIB,
        "gradients": memory.GIB,
        "optimizer": 2 * memory.GIB,
        "activations": memory.GIB // 2,
    }
    line = "memory: weights 1.0 + gradients 1.0 + optimizer 2.0 + activations 0.5 = 4.5 GiB (estimated)"
    assert memory.memory_line(needs) == line
    assert memory.memory_line({"weights": 3 * memory.MIB}) == "memory: weights 3.0 = 3.0 MiB (estimated)"


def test_checkpointed_activations_are_recommended_only_where_a_step_needs_more_than_is_free(monkeypatch):
    place = ModelConfig(12, 4, 128, 256), 257, 4, torch.float32, CPU
    needs, less = (memory.estimate(*place, method) for method in (Method(), LESS))
    beside_weights = sum(needs.values()) - needs["weights"]
    assert sum(less.values()) < 0.7 * sum(needs.values())
    for free, expected in ((beside_weights, 0), (beside_weights - 1, sum(less.values())), (0, sum(less.values()))):
        monkeypatch.setattr(memory, "free_memory", lambda _, free=free: free)
        assert memory.less_if_short(*place, Method()) == expected
        assert memory.less_if_short(*place, LESS) == 0
    monkeypatch.setattr(memory, "free_memory", lambda _: beside_weights)
    assert memory.less_if_short(*place, Method(), sharers=2) > 0
    line = memory.memory_line({"weights": 9 * memory.MIB}, less=3 * memory.MIB)
    assert line.endswith("(estimated); more than is free: --checkpoint_activations needs 3.0 MiB")


def test_fault_101_a_model_that_can_never_fit_is_refused_and_one_that_may_is_not():
    memory.check_fits(tiny_model().config, 257, CPU)
    with pytest.raises(InputError, match=r"n_layer 1000000, n_embd 768 needs [0-9,]{18,} bytes"):
        memory.check_fits(ModelConfig(n_layer=10**6), 50257, CPU)


def test_the_table_of_the_reference_is_the_estimate():
    text = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
    layers = {
        "gpt2": (12, 12, 768),
        "gpt2-medium": (24, 16, 1024),
        "gpt2-large": (36, 20, 1280),
        "gpt2-xl": (48, 25, 1600),
    }
    for name, sizes in layers.items():
        cells = []
        for rank in (0, 16):
            for less in (False, True):
                method = Method(lora=LoraConfig(lora_rank=rank), checkpoint_activations=less)
                place = torch.bfloat16, torch.device("cuda"), method
                needs = [memory.estimate(ModelConfig(*sizes), 50257, size, *place) for size in (1, 8)]
                cells.append(", ".join(f"{sum(parts.values()) / memory.GIB:.1f}" for parts in needs))
        assert f"| {name} | {' | '.join(cells)} |" in text
