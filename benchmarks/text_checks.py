"""Checks of generation for prove_cuda.py. Each returns what it found in a few words, or raises CheckFailed."""

import short_spins  # noqa: F401 (before torch)

import subprocess
import sys
from collections.abc import Iterable, Iterator
from types import SimpleNamespace

import torch
from programs import form_settings
from project import ROOT
from proof import Proof, expect
from reference import all_logits

import gpt
from gpt.generate.backend import BACKENDS
from gpt.generate.decode import Decoder
from gpt.generate.generator import TextGenerator
from gpt.generate.sampling import SamplingParams
from gpt.generate.sequence import GenerationParams, Sequence
from gpt.model import GPT, ModelConfig

PRECISIONS = ("fp32", "bf16", "fp16", "fp32:int8", "bf16:int8")
NAMES = ("eager", "captured", "compiled")
EVERY_FORM = [f"{precision}:{backend}" for precision in PRECISIONS for backend in NAMES]
PROMPTS = ["def main", "import os\nimport sys\n\n", "class A:\n    " * 10]
SPEED = {  # flags of decode_speed.py
    "cuda": "--model gpt2 --impl ours:bf16:captured,ours:bf16:eager,bandwidth --batch 1,64 --pairs 3 --minutes 1.5",
    "cpu": "--model tiny --impl ours:fp32:eager --batch 1 --pairs 2 --new_tokens 8",
}


def generators(proof: Proof, forms: Iterable[str]) -> Iterator[tuple[str, TextGenerator]]:
    """Yields (form, TextGenerator) of the trained model for each form, such as "bf16:captured". A CPU has only the
    eager back end."""
    for form in forms:
        if proof.device == "cuda" or form.endswith(":eager"):
            settings = form_settings(form.split(":"))
            yield form, gpt.load(proof.model(), device=proof.device, **settings)


def check_greedy(proof: Proof) -> str:
    """Checks that every greedy token has nearly the largest logit of the uncached model in the same precision, also
    where the text is longer than the context. In fp32 the gap is below 1e-4."""
    quick = ("fp32:eager", "fp32:captured", "bf16:captured", "bf16:int8:captured", "bf16:compiled")
    gaps = {}
    for form, generator in generators(proof, EVERY_FORM if proof.thorough else quick):
        gap = 0.0
        for prompts in (PROMPTS[:1], PROMPTS) if proof.thorough else (PROMPTS,):
            texts = generator.generate(prompts, max_new_tokens=400, temperature=0, ignore_eot=True, truncate=True)
            for prompt, [completion] in zip(prompts, texts, strict=True):
                gap = max(gap, largest_gap(generator, prompt, completion.ids))
        gaps[form] = gap
        print(f"      {form}: largest gap {gap:.1e}", flush=True)
    bad = [form for form, gap in gaps.items() if gap >= (1e-4 if "fp32" in form else 0.5)]
    expect(not bad, f"a chosen logit is too far below the maximum: {', '.join(bad)}")
    return f"{len(gaps)} forms, largest gap {max(gaps.values()):.1e}"


@torch.inference_mode()
def largest_gap(generator: TextGenerator, prompt: str, ids: list[int]) -> float:
    """Returns the largest distance of a chosen id's logit below the maximum, in the model without a cache.

    The window grows until it holds the whole context; then the last half of the context begins the next window."""
    model, context = generator.model, generator.model.config.block_size
    window, gap = generator.tokenizer.encode(prompt)[-context:], 0.0
    while ids:
        count = context - len(window) + 1  # ids chosen before the window is full
        chosen, ids = ids[:count], ids[count:]
        logits = all_logits(model, [window + chosen[:-1]])[0, len(window) - 1 :]  # (chosen, V)
        logits[:, generator.tokenizer.eot] = -torch.inf
        at_chosen = logits.gather(1, torch.tensor(chosen, device=logits.device)[:, None])
        gap = max(gap, (logits.amax(1, keepdim=True) - at_chosen).max().item())
        window = (window + chosen)[-(context // 2) :]
    return gap


def check_neighbours(proof: Proof) -> str:
    """Checks that a sampled text has the same bits whatever the other rows hold and whenever it gets its row."""
    forms = EVERY_FORM if proof.thorough else ("bf16:captured", "bf16:eager")
    for form, generator in generators(proof, forms):
        settings = {"max_new_tokens": 300, "seed": 7, "rows": 4, "logprobs": True}
        [alone] = generator.generate(["import"], **settings)
        first, *_ = generator.generate(["import", "x = 1", "class B:\n    def f", "#" * 200], truncate=True, **settings)
        expect(alone == first, f"{form}: the text depends on its neighbours")
        many = [f"{word} = {number}" for number in range(10) for word in ("a", "total", "self.long_name_of_it")]
        late = generator.generate([*many, "import"], [*range(100, 130), 1], **settings)[-1]
        expect(alone == late, f"{form}: the text depends on when it began")
        print(f"      {form}: equal", flush=True)
    return "equal"


def check_same_texts(proof: Proof) -> str:
    """Checks that in fp32 all back ends draw the same texts, except for draws at the border of two tokens."""
    forms = [f"fp32:{backend}" for backend in (NAMES if proof.thorough else NAMES[:2])]
    prompts = [f"def f{n}(x):\n" for n in range(20)]
    penalized = {"min_p": 0.02, "repetition_penalty": 1.2}
    for settings in ({}, {"top_k": 50}, {"top_p": 0.99, "temperature": 1.5}, penalized):
        texts = {}
        for form, generator in generators(proof, forms):
            completions = generator.generate(prompts, seed=3, max_new_tokens=100, rows=8, num_samples=2, **settings)
            texts[form] = [completion.ids for samples in completions for completion in samples]
        for form, ids in texts.items():
            same = sum(a == b for a, b in zip(ids, texts["fp32:eager"], strict=True))
            expect(same >= 36, f"{form}, {settings}: only {same} of 40 texts equal the eager back end's")
    return "at least 36 of 40 texts in each of four settings"


def check_undecided(proof: Proof) -> str:
    """Checks that the captured back end draws as the eager one does from a flat distribution, where its shortlist of
    candidates does not decide."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=64, block_size=64), 8192).to(proof.device).eval()
    tokenizer = SimpleNamespace(eot=0, stops=(0,), decode_bytes=lambda ids: b"x")
    params = GenerationParams(100, SamplingParams(top_p=0.98, temperature=1.0), seed=1, ignore_eot=True)
    texts = []
    for backend in ("eager", "captured"):
        decoder = Decoder(BACKENDS[backend](model), 4, 0)
        sequences = [Sequence(n, n, [1, 2, 3 + n], n, 0, params, tokenizer) for n in range(10)]
        for _ in decoder.events(sequences):
            pass
        texts.append([sequence.ids for sequence in sequences])
    same = sum(a == b for a, b in zip(*texts, strict=True))
    expect(same >= 8, f"only {same} of 10 texts agree")
    return f"{same} of 10 texts agree"


def check_memory(proof: Proof) -> str:
    """Checks that a stream of 20,000 tokens takes no more memory than its first thousand."""
    generator = gpt.load(proof.model(), device="cuda", dtype="bf16", backend="captured")
    params = generator.params(max_new_tokens=20_000, ignore_eot=True, seed=1)
    reserved = []
    for number, _ in enumerate(generator.events(["import"], [params])):
        if number % 1000 == 999:
            reserved.append(torch.cuda.memory_reserved())
    expect(max(reserved) <= reserved[0] * 1.05, f"memory grew from {reserved[0]} to {max(reserved)} bytes")
    return f"{max(reserved) / 2**20:.0f} MiB reserved"


def check_speed(proof: Proof) -> str:
    """Checks that decode_speed.py runs, and shows its table: GPT-2 124M, or all its sizes and back ends if thorough."""
    words = "--minutes 8" if proof.thorough and proof.device == "cuda" else SPEED[proof.device]
    command = [sys.executable, str(ROOT / "benchmarks/decode_speed.py"), "--device", proof.device, *words.split()]
    code = subprocess.run([*command, "--work", str(proof.runs)]).returncode
    expect(code == 0, f"decode_speed.py exited with {code}")
    return "see the table above"
