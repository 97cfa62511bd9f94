"""Every way to run the step against the uncached rule and against plain torch: launches ahead, compiled, int8."""

import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_generator import CONFIG, EOT, PROMPTS, greedy, random_model, window_logits
from torch._inductor.utils import run_and_get_code
from training_helpers import save_step

from gpt import device
from gpt.errors import InputError, NonFiniteError, ResourceError
from gpt.generate import backend, step
from gpt.generate.backend import Backend, make_backend, pick_backend
from gpt.generate.generator import TextGenerator
from gpt.generate.sampling import Filters, SamplingParams, choose, random_draws
from gpt.generate.step import Step, Unchanged
from gpt.kernels import select
from gpt.kernels.native_model import NativeModel
from gpt.model import GPT, KVCache, ModelConfig
from gpt.quantize import int8_rows, to_int8
from gpt.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


def generator_of(model, name="eager"):
    return TextGenerator(model, load_tokenizer("byte"), backend=name)


@pytest.fixture(scope="module")
def eager():
    return generator_of(random_model())


def launching(generator, steps, lag):
    """Returns the same generator with launches of several steps whose results are fetched later, as on a GPU."""
    ahead = generator_of(generator.model)
    make = ahead.decoder

    def decoder(name, rows):
        made = make(name, rows)
        made.launcher = SimpleNamespace(launch=made.step.launch, most=steps, lag=lag)
        return made

    ahead.decoder = decoder
    return ahead


# ---- launches of several steps, fetched late


@pytest.mark.parametrize(("steps", "lag"), [(1, 1), (3, 1), (4, 0), (5, 2)])
def test_texts_are_the_same_however_many_steps_a_launch_has_and_however_late_its_results_come(eager, steps, lag):
    settings = {"max_new_tokens": 61, "seed": 4, "rows": 3, "num_samples": 2, "logprobs": True, "top_logprobs": 3}
    settings |= {"repetition_penalty": 1.3, "stop": ("a", "zz")}  # texts end at different times; most slide
    assert launching(eager, steps, lag).generate(PROMPTS, **settings) == eager.generate(PROMPTS, **settings)


def test_every_token_is_that_of_its_own_positions_draw_over_three_blocks_of_draws(eager):
    settings = {"max_new_tokens": 2 * step.DRAWS_AHEAD + 20, "seed": 1, "temperature": 5.0, "top_p": 1.0}
    (completion,) = launching(eager, 7, 1).generate("a", ignore_eot=True, **settings)[0]
    filters = Filters(1)
    filters.set(0, SamplingParams(temperature=5.0, top_p=1.0))
    logits = window_logits(eager.model, b"a", completion.ids)
    banned = torch.tensor([EOT])
    expected = [
        choose(values[None], filters, random_draws(1, 1, 0, turn, 1), banned=banned).item()
        for turn, values in enumerate(logits)
    ]
    different = [turn for turn, pair in enumerate(zip(completion.ids, expected, strict=True)) if pair[0] != pair[1]]
    assert len(different) <= 2  # rounding at the border of two tokens


def test_fault_087_a_non_finite_logit_is_named_though_later_steps_are_under_way():
    model = random_model()
    with torch.no_grad():
        model.position.weight[8] = math.nan  # reached by the sixth token after a prompt of four
    with pytest.raises(NonFiniteError, match="non-finite logits at token 6"):
        launching(generator_of(model), 3, 1).generate("abcd", ignore_eot=True)


def test_a_row_that_few_candidates_do_not_decide_is_taken_back_and_repeated(eager, monkeypatch):
    monkeypatch.setattr("gpt.generate.sampling.CANDIDATES", 20)
    settings = {"max_new_tokens": 50, "seed": 2, "rows": 3, "num_samples": 2, "logprobs": True}
    settings |= {"top_p": 0.8, "temperature": 2.0, "repetition_penalty": 1.2}
    expected = eager.generate(PROMPTS, **settings)
    monkeypatch.setattr(Backend, "narrow", True)
    ahead = launching(eager, 4, 1)
    assert ahead.generate(PROMPTS, **settings) == expected
    [decoder] = ahead.decoders.values()
    assert not decoder.step.narrow


def test_steps_run_to_warm_up_leave_no_trace(eager):
    decoder_step = Step(make_backend("eager", eager.model), 2, EOT)
    cache = decoder_step.cache
    cache.lengths += torch.tensor([3, 7])
    for tensor in (*cache.keys, *cache.values):
        tensor.normal_()
    tensors = (cache.lengths, *cache.keys, *cache.values, decoder_step.next, decoder_step.turns)
    before = [tensor.clone() for tensor in tensors]
    with Unchanged(decoder_step), torch.inference_mode():
        cache.lengths.zero_()
        decoder_step.run()
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


# ---- choosing


def test_what_cannot_run_here_is_refused_with_the_reason(eager):
    with pytest.raises(InputError, match="captured: CUDA graphs need a CUDA device"):
        generator_of(eager.model, "captured").generate("a")
    fp16 = generator_of(random_model().half(), "native")
    with pytest.raises(InputError, match="native: needs"):
        fp16.generate("a")


def test_a_short_text_does_not_wait_for_the_kernels_to_be_built_and_a_long_job_does(eager, monkeypatch):
    calls = []
    for name, result in (("load_library", None), ("build_now", object()), ("start_background_build", None)):
        monkeypatch.setattr(backend.build, name, lambda name=name, result=result: calls.append(name) or result)
    monkeypatch.setattr(backend, "supports", lambda _: True)
    monkeypatch.setattr(backend, "native_is_faster", lambda *_: True)
    assert (
        pick_backend("auto", eager.model, 10_000, 1) == "eager"
    )  # ten thousand steps of so small a model are short too
    assert calls == ["load_library", "start_background_build"]
    with torch.device("meta"):
        large = GPT(ModelConfig(), 50257)
    large.position.weight = torch.nn.Parameter(torch.zeros(1, 768))  # says "cpu"
    assert pick_backend("auto", large, 100, 1) == "eager"
    assert pick_backend("auto", large, 1000, 1) == "native"
    assert calls[4:] == ["build_now"]


# ---- native


@pytest.mark.parametrize("form", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("rows", [1, 3])
def test_fault_083_native_greedy_text_is_that_of_the_uncached_rule(kernels, form, rows):
    reference = random_model()
    model = {"fp32": reference, "bf16": random_model().bfloat16(), "int8": to_int8(random_model())}[form]
    generator = generator_of(model, "native")
    prompts = PROMPTS[: max(rows, 2)]
    found = greedy(generator, prompts, rows=rows)
    assert list(generator.made) == ["native"]
    if form == "int8":  # rounds the inputs of products where plain torch does not
        reference = Uncached(NativeModel(model, kernels))
    check_greedy(reference, prompts, found, {"fp32": 1e-4, "int8": 0, "bf16": 0.5}[form])


class Uncached:
    """A NativeModel that is called like a GPT, and reads all ids anew at every call."""

    def __init__(self, native):
        self.native, self.config = native, native.config

    def __call__(self, ids):
        cache = KVCache(self.config, len(ids))
        self.native.prefill(ids[:, :-1], cache)
        return self.native.decode(ids[:, -1], cache).clone()


@pytest.mark.parametrize("form", ["fp32", "bf16", "int8"])
def test_a_native_text_is_the_same_bits_in_any_number_of_rows(kernels, form):
    model = random_model(ModelConfig(n_layer=1, n_head=4, n_embd=64, block_size=32))
    model = {"fp32": lambda: model, "bf16": model.bfloat16, "int8": lambda: to_int8(model)}[form]()
    generator, prompts = generator_of(model, "native"), ["bb" * 9, "c", "the same prompt", "dd", "e" * 30]
    settings = {"max_new_tokens": 40, "seed": 3, "ignore_eot": True, "logprobs": True}
    found = [generator.generate(prompts, range(5), rows=rows, **settings) for rows in (1, 2, 5, 7)]
    torch.set_num_threads(2)
    found.append(generator.generate(prompts, range(5), rows=3, **settings))
    assert all(each == found[0] for each in found)


def test_native_draws_are_those_of_plain_torch(kernels, eager):
    native = generator_of(eager.model, "native")
    settings = {"max_new_tokens": 61, "seed": 4, "rows": 3, "num_samples": 2, "repetition_penalty": 1.3, "top_k": 9}
    agree = [
        ours.ids == theirs.ids
        for pair in zip(native.generate(PROMPTS, **settings), eager.generate(PROMPTS, **settings), strict=True)
        for ours, theirs in zip(*pair, strict=True)
    ]
    assert sum(agree) >= 7  # of 8: a draw at the border of two tokens falls to either by rounding


# ---- compiled


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fault_083_compiled_greedy_text_is_that_of_the_uncached_rule(dtype):
    model = random_model().to(dtype)
    for prompts in (PROMPTS[:1], PROMPTS[:3]):
        found = greedy(generator_of(model, "compiled"), prompts)
        check_greedy(model, prompts, found, 1e-4 if dtype == torch.float32 else 0.5)


@pytest.mark.slow
def test_a_compiled_step_copies_no_layer_of_the_cache():
    model = random_model(ModelConfig(n_layer=3, n_head=2, n_embd=32, block_size=64))
    cache = KVCache(model.config, 4)
    with torch.inference_mode():
        cache.is_empty = False
        compiled = torch.compile(Backend(model).decode, dynamic=False, fullgraph=True)
        _, sources = run_and_get_code(compiled, torch.tensor([1, 2, 3, 4]), cache)
    allocated = re.findall(r"empty_strided_\w+\(\(([\d, ]+)\)", "".join(sources))
    assert allocated
    assert not [shape for shape in allocated if math.prod(map(int, shape.split(", "))) >= cache.keys[0].numel()]


def check_greedy(model, prompts, found, tolerance):
    """Every chosen token's uncached logit is within `tolerance` of the largest."""
    for prompt, (completion,) in zip(prompts, found, strict=True):
        assert len(completion.ids) == 80
        logits = window_logits(model, list(prompt.encode()) or [EOT], completion.ids)
        for chosen, values in zip(completion.ids, logits, strict=True):
            values[EOT] = -math.inf
            assert values[chosen] >= values.max() - tolerance


# ---- int8


def test_int8_weights_are_within_half_a_step_of_the_row():
    weight = torch.randn(70, 33, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    weight[5, 2] = 100.0
    rows, scale = int8_rows(weight)
    assert rows.dtype == torch.int8
    assert (rows.abs().amax(1)[[0, 5]] == 127).all()
    assert ((rows * scale[:, None] - weight).abs() <= scale[:, None] * 0.50001).all()
    assert (rows[3] == 0).all()


def test_an_int8_model_computes_what_its_dequantized_weights_would():
    model, reference = random_model(), random_model()
    to_int8(model)
    for name, module in reference.named_modules():
        if isinstance(module, torch.nn.Linear) or name == "token":
            int8 = model.get_submodule(name)
            module.weight.data = int8.weight * int8.scale[:, None]
    ids = torch.arange(20).view(2, 10)
    torch.testing.assert_close(model(ids), reference(ids), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fault_083_int8_greedy_text_is_that_of_its_own_uncached_version(dtype):
    generator = generator_of(to_int8(random_model().to(dtype)))
    tolerance = 1e-4 if dtype == torch.float32 else 0.5
    check_greedy(generator.model, PROMPTS, greedy(generator, PROMPTS), tolerance)


@pytest.mark.parametrize(("form", "bound"), [("bf16", 0.02), ("int8", 0.02)])
def test_the_logit_error_of_a_shorter_form_is_a_small_share_of_their_spread(form, bound):
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=4, n_head=4, n_embd=128, block_size=64), 512).eval()
    ids = torch.randint(512, (8, 64))
    with torch.inference_mode():
        exact = model(ids)
        short = (model.bfloat16() if form == "bf16" else to_int8(model))(ids)
    assert (short - exact).square().mean().sqrt() < bound * exact.std()


# ---- memory


def test_out_of_memory_names_rows_and_context_and_the_flag_to_lower(eager, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(step, "free_memory", lambda _: 10_000)
        with pytest.raises(
            ResourceError, match=r"out of memory: 8 rows, context of 24 tokens: .* GiB .*; lower --rows"
        ):
            eager.generate(["a"] * 20, rows=8)

    def full(*_, **_named):
        raise torch.OutOfMemoryError("CUDA out of memory")

    broken = generator_of(random_model())
    broken.model.forward = full
    with pytest.raises(ResourceError, match=r"out of memory: 2 rows, context of 24 tokens; lower --rows"):
        broken.generate(["a"] * 20, rows=2)
    broken.model.hidden = lambda *_: torch.zeros(1 << 50)  # as the CPU's allocator says it
    broken.made.clear()
    with pytest.raises(ResourceError, match=r"out of memory: 3 rows, context of 24 tokens; lower --rows"):
        broken.generate(["abc"] * 20, rows=3)


def test_no_more_rows_are_chosen_than_memory_has_room_for(eager, monkeypatch):
    row = 2 * CONFIG.n_layer * CONFIG.block_size * CONFIG.n_embd * 4
    cache = KVCache(CONFIG, 1)
    assert step.row_bytes(eager.model) == row == sum(t.nbytes for t in (*cache.keys, *cache.values))
    for free, rows in ((row * 7, 3), (1, 1), (10**12, 8)):
        monkeypatch.setattr("gpt.generate.generator.free_memory", lambda _, free=free: free)
        assert eager.fitting_rows(100) == rows


def test_the_cache_of_the_last_texts_is_used_again_but_never_by_two_at_once(eager):
    first, second = eager.stream("abc", seed=1, max_new_tokens=40), eager.stream("xyz", seed=2, max_new_tokens=40)
    mixed = [piece for pair in zip(first, second, strict=False) for piece in pair]
    fresh = generator_of(eager.model)
    for prompt, seed, begun in (("abc", 1, "".join(mixed[::2])), ("xyz", 2, "".join(mixed[1::2]))):
        assert len(begun) > 10
        assert fresh.generate(prompt, seed=seed, max_new_tokens=40)[0][0].text.startswith(begun)
    decoders = fresh.decoders.copy()
    fresh.generate("abc", max_new_tokens=3)
    assert fresh.decoders == decoders


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eager", "native"])
def test_fault_094_the_memory_of_20000_tokens_past_the_context_is_flat(kernels, name):
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs Linux's /proc")
    generator = generator_of(random_model(ModelConfig(n_layer=2, n_head=2, n_embd=64, block_size=128)), name)
    params, used = generator.params(max_new_tokens=20_000, ignore_eot=True, seed=1), []
    for number, _ in enumerate(generator.run(["abc"], params)):
        if number % 1000 == 999:
            used.append(int(Path("/proc/self/statm").read_text().split()[1]))
    assert len(used) == 20
    assert max(used) <= used[0] * 1.05


@pytest.mark.parametrize("name", ["eager", "native"])
def test_weights_that_change_between_two_texts_change_the_second(kernels, name):
    generator, other = generator_of(random_model(), name), random_model(seed=1)
    greedy(generator, "abc")
    with torch.no_grad():
        for mine, its in zip(generator.model.parameters(), other.parameters(), strict=True):
            mine.copy_(its)  # as training does
    assert greedy(generator, "abc") == greedy(generator_of(other, name), "abc")
    generator.model.load_state_dict(random_model(seed=2).state_dict(), assign=True)
    assert greedy(generator, "abc") == greedy(generator_of(random_model(seed=2), name), "abc")
    generator.model.bfloat16()
    assert greedy(generator, "abc") == greedy(generator_of(random_model(seed=2).bfloat16(), name), "abc")


@pytest.mark.parametrize("name", ["eager", "native"])
def test_generating_in_inference_mode_leaves_nothing_that_fails_outside_of_it(kernels, name):
    generator = generator_of(random_model(), name)
    with torch.inference_mode():
        expected = greedy(generator, "abc")
    assert greedy(generator, "abc") == expected
    ids = torch.tensor([[1, 2, 3]])
    generator.model(ids, ids).sum().backward()


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_a_model_loaded_in_inference_mode_generates_there_and_can_be_trained_later(tmp_path, quantize):
    folder = save_step(tmp_path, 1, random_model())
    shutil.rmtree(folder / "training")  # no manifest of ours: as any Hugging Face folder
    with torch.inference_mode():
        generator = TextGenerator.load(folder, dtype="fp32", quantize=quantize, backend="eager")
        expected = greedy(generator, "abc")
    assert greedy(generator, "abc") == expected
    if quantize == "none":
        ids = torch.tensor([[1, 2, 3]])
        generator.model(ids, ids).sum().backward()


def test_a_model_whose_weights_were_made_in_inference_mode_generates():
    with torch.inference_mode():
        generator = generator_of(random_model())
        expected = greedy(generator, "abc")
    assert greedy(generator, "abc") == expected == greedy(generator_of(random_model()), "abc")


# ---- on a GPU, as far as a CPU shows it


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
        subprocess.CalledProcessError(1, ["gcc", "Python.h"]),
        FileNotFoundError("gcc"),
        ImportError("no triton"),
    ],
)
def test_fault_132_where_triton_cannot_compile_plain_torch_runs_the_attention(monkeypatch, capsys, error):
    def launch(*_):
        raise error

    monkeypatch.setitem(sys.modules, "gpt.kernels.triton_attention", SimpleNamespace(decode_attention=launch))
    select.triton_attention.cache_clear()
    assert select.triton_attention(torch.device("cpu")) is None
    assert "no Triton kernel" in capsys.readouterr().err
    select.triton_attention.cache_clear()


@pytest.mark.parametrize(("cc", "known", "expected"), [("", (), False), ("", ("clang",), True), ("icx", (), True)])
def test_fault_132_a_c_compiler_is_looked_for_as_triton_does(monkeypatch, cc, known, expected):
    monkeypatch.setenv("CC", cc)
    monkeypatch.setattr(device.shutil, "which", lambda name: name if name in known else None)
    assert device.has_compiler() is expected


def test_a_prompt_on_a_gpu_never_makes_cudnn_plan_its_attention():
    enabled = torch.backends.cuda.cudnn_sdp_enabled
    seen, before = [], enabled()
    model = SimpleNamespace(device=torch.device("cuda"), hidden=lambda *_: seen.append(enabled()))
    Backend(model).prefill(None, None)
    assert seen == [False]
    assert enabled() == before


# ---- settings of each prompt, and what is reported


def test_each_prompt_may_have_settings_of_its_own(eager):
    settings = [
        {"temperature": 0.0, "max_new_tokens": 9},
        {"top_k": 3, "max_new_tokens": 30, "seed": 8, "stop": ("e",)},
        {"top_p": 0.5, "num_samples": 3, "ignore_eot": True, "max_new_tokens": 40, "repetition_penalty": 1.5},
        {"min_p": 0.2, "top_p": 1.0, "logprobs": True, "max_new_tokens": 12},
    ]
    params = [eager.params(**{"seed": 1, "rows": 4} | each) for each in settings]
    found = {}
    for sequence, _ in eager.run(PROMPTS, params, [1, 2, 3, 4]):
        if sequence.finish_reason:
            found[sequence.number, sequence.sample] = sequence.completion
    for number, each in enumerate(settings):
        alone = eager.generate([PROMPTS[number]], [number + 1], **{"seed": 1, "rows": 4} | each)[0]
        assert [found[number, sample] for sample in range(len(alone))] == alone
    assert len(found) == 6


def test_the_likeliest_tokens_are_those_of_the_unfiltered_model(eager):
    settings = {"max_new_tokens": 40, "seed": 5, "ignore_eot": True, "top_k": 4, "logprobs": True, "top_logprobs": 5}
    (completion,) = eager.generate("abc", **settings)[0]
    logits = window_logits(eager.model, b"abc", completion.ids)
    for values, chosen, logprob, likeliest in zip(
        logits, completion.ids, completion.logprobs, completion.top_logprobs, strict=True
    ):
        expected = values.double().log_softmax(-1).topk(5)
        assert [i for i, _ in likeliest] == expected.indices.tolist()
        assert [value for _, value in likeliest] == pytest.approx(expected.values.tolist(), abs=1e-4)
        assert dict(likeliest).get(chosen, logprob) == pytest.approx(logprob, abs=1e-6)
    assert eager.generate("abc", max_new_tokens=3)[0][0].top_logprobs is None
