"""The architecture against transformers, the cache against no cache, and what padding must not do."""

import math

import pytest
import torch
import torch.nn.functional as F
from model_helpers import SMALL, VOCABULARY, random_ids, random_model

from gpt.errors import InputError
from gpt.loss import IGNORED
from gpt.model import GPT, KVCache, ModelConfig, total_parameters

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model():
    return random_model()


def as_transformers(model):
    """Returns the same weights in transformers' GPT2LMHeadModel, whose linear layers keep the transpose."""
    transformers = pytest.importorskip("transformers")
    config = model.config
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=model.vocab_size,
            n_positions=config.block_size,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
        )
    ).eval()
    names = {"token": "wte", "position": "wpe", "blocks": "h", "qkv": "c_attn", "fc": "c_fc", "proj": "c_proj"}
    state = {}
    for name, value in model.state_dict().items():
        words = [names.get(word, word) for word in name.split(".")]
        transposed = words[-2].startswith("c_") and words[-1] == "weight"
        state[".".join(["transformer", *words])] = value.T if transposed else value
    state["transformer.wte.weight"] = state["transformer.wte.weight"][: model.vocab_size]
    state["lm_head.weight"] = state["transformer.wte.weight"]
    theirs.load_state_dict(state)
    return theirs


def all_logits(model, ids):
    """Returns the logits (B, T, V) at every position, each from a forward pass over the ids up to it."""
    return torch.stack([model(ids[:, : n + 1]) for n in range(ids.shape[1])], dim=1)


@torch.no_grad()
def test_logits_and_losses_are_those_of_transformers_for_the_same_weights(model):
    ids = random_ids(3, 20)
    theirs = as_transformers(model)(ids).logits
    torch.testing.assert_close(all_logits(model, ids), theirs, rtol=0, atol=1e-4)
    expected = F.cross_entropy(theirs[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    torch.testing.assert_close(model(ids[:, :-1], ids[:, 1:]), expected, rtol=0, atol=1e-4)


def test_gpt2_small_has_124439808_parameters():
    with torch.device("meta"):
        model = GPT(ModelConfig(), 50257)
    assert model.num_parameters() == total_parameters(model.config, model.vocab_size) == 124_439_808
    assert len(model.token.weight) == 50304


@torch.no_grad()
def test_the_initial_loss_is_near_the_logarithm_of_the_vocabulary_size():
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=4, n_head=4, n_embd=64, block_size=64), 5000)
    ids = random_ids(4, 65, vocabulary=5000)
    assert abs(model(ids[:, :-1], ids[:, 1:]).mean().item() - math.log(5000)) < 0.1


def test_weights_begin_with_the_standard_deviations_of_gpt2():
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=6, n_head=4, n_embd=128, block_size=64), 1000)
    small = 0.02 / math.sqrt(12)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "ln_" in name:
            assert (parameter == 1).all(), name
        else:
            values = parameter[: model.vocab_size] if name == "token.weight" else parameter
            wanted = small if name.endswith("proj.weight") else 0.02
            assert values.std().item() == pytest.approx(wanted, rel=0.03), name
            assert abs(values.mean().item()) < 0.001, name


def test_each_layers_keys_and_values_are_tensors_of_their_own():
    """A compiled step copies the whole tensor that an append changes a part of."""
    cache = KVCache(SMALL, 3)
    tensors = [*cache.keys, *cache.values]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors) == 2 * SMALL.n_layer
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.is_contiguous() for tensor in tensors)


@torch.no_grad()
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.bfloat16, 0.15)])
def test_cached_logits_are_uncached_logits_for_a_prompt_split_5_1_1_3_2(model, dtype, bound):
    model, ids, cache = model.to(dtype), random_ids(3, 12), KVCache(SMALL, 3, dtype)
    start = 0
    for length in (5, 1, 1, 3, 2):
        logits = model(ids[:, start : start + length], cache=cache)
        start += length
        torch.testing.assert_close(logits, model(ids[:, :start]), rtol=0, atol=bound)
        assert cache.lengths.tolist() == [start] * 3


@torch.no_grad()
def test_rows_of_unequal_length_continue_each_at_its_own_position(model):
    ids, lengths, cache = random_ids(4, SMALL.block_size), [1, 7, 18, 3], KVCache(SMALL, 4)
    for keys, values in zip(cache.keys, cache.values, strict=True):  # what a row does not hold must not matter
        keys.fill_(1e3)
        values.fill_(-1e3)
    for row, length in enumerate(lengths):
        model(ids[row : row + 1, :length], cache=cache.empty_row(row))
    for step in range(5):
        new = torch.stack([ids[row, length + step] for row, length in enumerate(lengths)])[:, None]
        logits = model(new, cache=cache)
        for row, length in enumerate(lengths):
            expected = model(ids[row : row + 1, : length + step + 1])[0]
            torch.testing.assert_close(logits[row], expected, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("rows", [3, 8])  # decode.slot_count allows only such numbers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_logits_are_the_same_bits_in_any_slot_beside_any_rows(dtype, rows):
    torch.set_num_threads(2)  # which thread a row falls to must not matter
    config = ModelConfig(n_layer=1, n_head=4, n_embd=256, block_size=128)
    model, ids, seen = random_model(config).to(dtype), random_ids(1, 30), []
    for slot in range(rows):
        cache = KVCache(config, rows, dtype)
        for row in range(rows):
            other = random_ids(1, 5 + 13 * row, seed=10 * slot + row)
            model(ids[:, :-1] if row == slot else other, cache=cache.empty_row(row))
        new = random_ids(rows, 1, seed=slot)
        new[slot] = ids[0, -1]
        seen.append(model(new, cache=cache)[slot])
    assert all(torch.equal(seen[0], other) for other in seen)


@torch.no_grad()
def test_copied_rows_continue_as_their_source(model):
    ids, cache = random_ids(1, 9), KVCache(SMALL, 3)
    model(ids[:, :8], cache=cache.empty_row(2))
    cache.copy_rows(torch.tensor([2, 2]), torch.tensor([0, 1]), 8)
    cache.lengths[:2] = 8
    logits = model(ids[:, 8:].expand(3, 1), cache=cache)
    torch.testing.assert_close(logits[0], model(ids)[0], rtol=0, atol=1e-4)
    assert torch.equal(logits[0], logits[2]) and torch.equal(logits[1], logits[2])


@torch.no_grad()
def test_changing_a_later_token_leaves_earlier_losses_alone(model):
    ids = random_ids(2, 20)
    before = model(ids[:, :-1], ids[:, 1:])
    changed = ids.clone()
    changed[:, 12] = (changed[:, 12] + 1) % VOCABULARY
    after = model(changed[:, :-1], changed[:, 1:])
    assert torch.equal(before[:, :11], after[:, :11])
    assert not torch.isclose(before[:, 11:], after[:, 11:]).all(0).any()


def test_a_position_past_the_context_is_an_error_naming_both_numbers(model):
    with pytest.raises(ValueError, match="position 25 is past block_size 24"):
        model(random_ids(1, 25))
    cache = KVCache(SMALL, 1)
    with torch.no_grad():
        model(random_ids(1, 24), cache=cache)
        with pytest.raises(ValueError, match="position 25 is past block_size 24"):
            model(random_ids(1, 1), cache=cache)


def test_ignored_targets_have_loss_zero_and_no_gradient(model):
    ids = random_ids(2, 10)
    targets = ids.roll(-1, 1)
    targets[:, ::2] = IGNORED
    losses = model(ids, targets)
    assert (losses[:, ::2] == 0).all()
    assert (losses[:, 1::2] > 0).all()
    losses.sum().backward()
    expected = model.token.weight.grad.clone()
    model.zero_grad()
    full = model(ids, ids.roll(-1, 1))
    full[:, 1::2].sum().backward()
    torch.testing.assert_close(model.token.weight.grad, expected)


def test_fault_088_padding_rows_are_zero_get_no_gradient_and_take_no_probability(model):
    ids = random_ids(2, 12)
    targets = ids.roll(-1, 1)
    assert len(model.token.weight) == 192
    losses = model(ids, targets)
    losses.sum().backward()
    assert (model.token.weight[VOCABULARY:] == 0).all()
    assert (model.token.weight.grad[VOCABULARY:] == 0).all()
    with torch.no_grad():
        logits = all_logits(model, ids)
        assert logits.shape[-1] == VOCABULARY
        expected = -logits.double().log_softmax(-1).gather(2, targets[..., None])[..., 0]
        torch.testing.assert_close(losses.double(), expected, rtol=0, atol=1e-4)


def test_logits_and_losses_are_float32_in_bf16():
    model, ids = random_model().bfloat16(), random_ids(1, 5)
    assert model(ids).dtype == model(ids, ids).dtype == torch.float32


def test_all_problems_of_a_model_configuration_come_in_one_message():
    with pytest.raises(InputError, match=r"n_layer 0.*n_head 5 must divide n_embd 32.*dropout 1"):
        GPT(ModelConfig(n_layer=0, n_head=5, n_embd=32, dropout=1.0), 100)


def test_a_tiny_model_overfits_a_sentence():
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=48), 257)
    sentence = b"The rain in Spain stays mainly in the plain."
    ids = torch.tensor([[256, *sentence]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(70):
        loss = model(ids[:, :-1], ids[:, 1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    text = [256]
    with torch.no_grad():
        for _ in sentence:
            text.append(model(torch.tensor([text])).argmax().item())
    assert bytes(text[1:]) == sentence
