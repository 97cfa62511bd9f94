"""For tests that generate: small random models, scripted ones, the rule without a cache, sample.py in a process."""

import math
import subprocess
import sys
import time

import torch
from paths import ROOT

import sample
from gpt.generate.backend import Backend
from gpt.generate.generator import TextGenerator, weight_versions
from gpt.model import GPT, ModelConfig
from gpt.text.tokenizer import load_tokenizer

EOT = 256
CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=24)
PROMPTS = ["The quick brown fox", "a", "", "0123456789abcdefghij"]


# ---- models


def random_model(config=CONFIG, vocabulary=257, seed=0):
    """Returns a GPT whose logits are far enough apart that rounding does not decide."""
    torch.manual_seed(seed)
    model = GPT(config, vocabulary)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6)
    return model.eval()


def generator_of(model, backend="eager"):
    return TextGenerator(model, load_tokenizer("byte"), backend=backend)


def small_generator(config=ModelConfig(1, 1, 16, 64)):  # noqa: B008
    """Returns a TextGenerator of the untrained model that seed 0 gives."""
    torch.manual_seed(0)
    return generator_of(GPT(config, 257))


# ---- models that choose what a test wants


def scripted_decode(ids, eot=EOT):
    """Returns a function in place of Backend.decode: whatever the prompt, exactly these ids are chosen, then
    end-of-text for ever."""
    choices = iter([*ids, *[eot] * 1000])

    def decode(tokens, cache):
        cache.lengths += 1
        logits = torch.zeros(len(tokens), eot + 1)
        logits[:, next(choices)] = 50.0
        return logits

    return decode


def replace_decode(monkeypatch, decode):
    """Makes plain torch's back end call `decode(ids, cache)` instead of the model."""
    monkeypatch.setattr(Backend, "decode", staticmethod(decode))


def scripted(ids):
    """Returns a TextGenerator whose model chooses exactly these ids, then end-of-text for ever."""
    generator = generator_of(random_model(ModelConfig(1, 1, 16, 64)))
    backend = Backend(generator.model)
    backend.decode = scripted_decode(ids)
    generator.backends, generator.versions = {"eager": backend}, weight_versions(generator.model)
    return generator


# ---- greedy texts against the rule without a cache


def greedy(generator, prompts, count=80, **settings):
    return generator.generate(prompts, max_new_tokens=count, temperature=0.0, ignore_eot=True, seed=0, **settings)


@torch.no_grad()
def window_logits(model, prompt, chosen):
    """Returns the logits from which each of the ids `chosen` came, without a cache, by the rule itself: of all ids so
    far until they would be more than block_size; then only the last half stays, and grows again."""
    window, size, logits = list(prompt), model.config.block_size, []
    for i in chosen:
        if len(window) > size:
            window = window[-(size // 2) :]
        logits.append(model(torch.tensor([window]))[0])
        window.append(i)
    return logits


def check_greedy(model, prompts, texts, tolerance):
    """Asserts that every chosen token's uncached logit is within `tolerance` of the largest."""
    for prompt, (completion,) in zip(prompts, texts, strict=True):
        assert len(completion.ids) == 80
        logits = window_logits(model, list(prompt.encode()) or [EOT], completion.ids)
        for chosen, values in zip(completion.ids, logits, strict=True):
            values[EOT] = -math.inf
            assert values[chosen] >= values.max() - tolerance


# ---- sample.py in a process of its own

PROGRAM = """
import sys, time, torch
sys.path[:0] = {paths!r}
import sample
from generation_helpers import small_generator
torch.set_num_threads(1)
load = sample.TextGenerator.load = lambda *_: small_generator()
{before}
sample.run_main(sample.main)
"""


def start_fresh(*flags, before="", **settings):
    """Starts sample.py with a small random model as every checkpoint, after the lines `before`, in a new Python."""
    program = PROGRAM.format(paths=[str(ROOT), str(ROOT / "tests")], before=before)
    command = [sys.executable, "-c", program, "checkpoint", *flags]
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL} | settings
    return subprocess.Popen(command, **settings)


def sample_after(before, *flags):
    """Does what a process of `start_fresh` does, in this process."""
    torch.set_num_threads(1)
    load = sample.TextGenerator.load = lambda *_: small_generator()
    exec(before, {"load": load, "sample": sample, "sys": sys, "time": time, "torch": torch})
    sys.argv = ["sample.py", "checkpoint", *flags]
    sample.run_main(sample.main)
