"""Scores against brute force: every token from a forward pass of its own window."""

import math

import pytest
import torch

from gpt.errors import InputError
from gpt.generate.generator import TextGenerator
from gpt.generate.score import score_text
from gpt.model import GPT, ModelConfig
from gpt.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

EOT = 256


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=24), 257)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6)  # so that it matters what a token's window holds
    return TextGenerator(model.eval(), load_tokenizer("byte"))


@pytest.mark.parametrize("length", [1, 24, 25, 60])
@pytest.mark.parametrize("stride", [0, 5, 24])
def test_a_score_is_the_brute_force_sum_over_overlapping_windows(generator, length, stride):
    text = "".join(chr(97 + (7 * n) % 26) for n in range(length))
    score = generator.score(text, stride)
    ids, step = [EOT, *text.encode()], stride or 12
    for place, logprob in enumerate(score.logprobs, 1):
        start = max(0, math.ceil((place - 24) / step)) * step  # the first window that reaches the token
        with torch.no_grad():
            logits = generator.model(torch.tensor([ids[start:place]]))[0]
        assert logprob == pytest.approx(logits.log_softmax(-1)[ids[place]].item(), abs=1e-4)
    assert (score.tokens, score.bytes, score.ids) == (length, length, ids[1:])
    assert score.nats == pytest.approx(-sum(score.logprobs))
    assert score.perplexity == pytest.approx(math.exp(score.nats / length))
    assert score.bits_per_byte == pytest.approx(score.nats / math.log(2) / length)


def test_scoring_nothing_or_with_a_stride_past_the_window_is_refused(generator):
    with pytest.raises(InputError, match="empty"):
        score_text(generator.model, generator.tokenizer, "")
    with pytest.raises(InputError, match="stride 25"):
        score_text(generator.model, generator.tokenizer, "abc", stride=25)


def test_scoring_that_fails_gives_the_model_its_training_state_back(generator, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of memory")

    generator.model.train()
    monkeypatch.setattr(generator.model, "forward", fail)
    with pytest.raises(RuntimeError):
        generator.score("abc")
    assert generator.model.training
    generator.model.eval()
