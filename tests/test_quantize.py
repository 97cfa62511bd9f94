"""Weights in 8 bits against the weights that they stand for."""

import pytest
import torch
from model_helpers import VOCABULARY, random_ids, random_model

from gpt.loss import IGNORED
from gpt.model import GPT, ModelConfig
from gpt.quantize import LARGEST, int8_product, int8_rows, to_int8

pytestmark = pytest.mark.usefixtures("one_thread")


def dequantized(model):
    """Returns the same model with the float32 weights that its int8 weights stand for."""
    reference = random_model(model.config, model.vocab_size)
    for name, module in reference.named_modules():
        if isinstance(module, torch.nn.Linear) or name == "token":
            int8 = model.get_submodule(name)
            module.weight.data = int8.weight * int8.scale[:, None]
    return reference


def test_int8_weights_are_within_half_a_step_of_the_row():
    weight = torch.randn(70, 33, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    weight[5, 2] = 100.0
    rows, scale = int8_rows(weight)
    assert rows.dtype == torch.int8
    assert (rows.abs().amax(1)[[0, 5]] == LARGEST).all()
    assert ((rows * scale[:, None] - weight).abs() <= scale[:, None] * 0.50001).all()
    assert (rows[3] == 0).all()


def test_a_row_and_its_negative_are_quantized_alike():
    weight = torch.randn(9, 33, generator=torch.Generator().manual_seed(1))
    (rows, scale), (negative_rows, negative_scale) = int8_rows(weight), int8_rows(-weight)
    assert torch.equal(rows, -negative_rows)
    assert torch.equal(scale, negative_scale)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 0.01), (torch.float16, 1e-3)])
def test_a_product_with_int8_weights_is_that_with_the_weights_they_stand_for(dtype, bound):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 5, 64, generator=generator).to(dtype)
    weight, scale = int8_rows(torch.randn(96, 64, generator=generator))
    exact = x.double() @ (weight * scale[:, None]).double().T
    found = int8_product(x, weight, scale)
    assert found.dtype == dtype
    assert (found.double() - exact).norm() <= bound * exact.norm()


@torch.no_grad()
def test_an_int8_model_computes_what_its_dequantized_weights_would():
    model = to_int8(random_model())
    reference, ids = dequantized(model), random_ids(2, 10)
    targets = ids.roll(-1, 1)
    targets[:, ::3] = IGNORED
    torch.testing.assert_close(model(ids), reference(ids), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(model(ids, targets), reference(ids, targets), rtol=1e-5, atol=1e-4)
    assert model(ids).shape == (2, VOCABULARY)


@pytest.mark.parametrize("form", ["bf16", "int8"])
def test_the_logit_error_of_a_shorter_form_is_a_small_share_of_their_spread(form):
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=4, n_head=4, n_embd=128, block_size=64), 512).eval()
    ids = torch.randint(512, (8, 64))
    with torch.inference_mode():
        exact = model(ids)
        short = (model.bfloat16() if form == "bf16" else to_int8(model))(ids)
    assert (short - exact).square().mean().sqrt() < 0.02 * exact.std()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_that_is_not_a_matrix_gets_the_type_that_is_asked_for(dtype):
    model = to_int8(random_model(), dtype)
    assert model.dtype == dtype
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert {buffer.dtype for name, buffer in model.named_buffers() if name.endswith("weight")} == {torch.int8}
