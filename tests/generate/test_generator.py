"""Generation against brute force without a cache, and everything that must not change a text."""

import gc
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import scripted_decode

from gpt.errors import InputError, NonFiniteError
from gpt.generate import step
from gpt.generate.backend import Backend, make_backend
from gpt.generate.generator import TextGenerator, weights_now
from gpt.generate.step import DRAWS_AHEAD
from gpt.model import GPT, ModelConfig
from gpt.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

EOT = 256
CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=24)
PROMPTS = ["The quick brown fox", "a", "", "0123456789abcdefghij"]


def random_model(config=CONFIG, vocabulary=257, seed=0):
    torch.manual_seed(seed)
    model = GPT(config, vocabulary)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6)  # logits far enough apart that rounding does not decide
    return model.eval()


@pytest.fixture(scope="module")
def generator():
    return TextGenerator(random_model(), load_tokenizer("byte"))


@torch.no_grad()
def window_logits(model, prompt, chosen):
    """The logits from which each of the ids `chosen` came, without a cache, by the rule itself: of all ids so far until
    they would be more than block_size; then only the last half stays, and grows again."""
    window, size, seen = list(prompt), model.config.block_size, []
    for i in chosen:
        if len(window) > size:
            window = window[-(size // 2) :]
        seen.append(model(torch.tensor([window]))[0])
        window.append(i)
    return seen


def greedy(generator, prompts, count=80, **settings):
    return generator.generate(prompts, max_new_tokens=count, temperature=0.0, ignore_eot=True, seed=0, **settings)


# ---- the cache and the context's edge


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS[:3], PROMPTS, ["x" * 24]])
def test_fault_083_084_cached_greedy_text_is_that_of_the_uncached_rule_across_the_context_edge(generator, prompts):
    for prompt, (completion,) in zip(prompts, greedy(generator, prompts), strict=True):
        ids = list(prompt.encode()) or [EOT]
        assert len(completion.ids) == 80  # the context is 24: the edge is crossed four times and more
        logits = window_logits(generator.model, ids, completion.ids)
        for chosen, values in zip(completion.ids, logits, strict=True):
            values[EOT] = -math.inf
            assert values[chosen] >= values.max() - 1e-4


def test_log_probabilities_are_the_unfiltered_models_in_any_window(generator):
    (completion,) = generator.generate("abc", max_new_tokens=60, top_k=3, seed=5, ignore_eot=True, logprobs=True)[0]
    logits = window_logits(generator.model, b"abc", completion.ids)
    expected = [values.double().log_softmax(-1)[i].item() for i, values in zip(completion.ids, logits, strict=True)]
    assert completion.logprobs == pytest.approx(expected, abs=1e-4)


def test_a_prompt_of_exactly_the_context_is_read_whole_before_its_first_token(generator):
    prompt = "abcdefghijklmnopqrstuvwx"
    (completion,) = greedy(generator, prompt, count=1)[0]
    with torch.no_grad():
        logits = generator.model(torch.tensor([list(prompt.encode())]))[0]
    logits[EOT] = -math.inf
    assert completion.ids == [logits.argmax().item()]


def test_the_repetition_penalty_counts_what_is_in_the_window_and_nothing_else(generator):
    penalty, window, size = 1.5, list(b"abcab"), CONFIG.block_size
    (completion,) = greedy(generator, "abcab", count=60, repetition_penalty=penalty)[0]
    for chosen in completion.ids:
        if len(window) > size:
            window = window[-(size // 2) :]
        with torch.no_grad():
            logits = generator.model(torch.tensor([window]))[0]
        for seen in set(window):
            logits[seen] = logits[seen] * penalty if logits[seen] < 0 else logits[seen] / penalty
        logits[EOT] = -math.inf
        assert logits[chosen] >= logits.max() - 1e-4
        window.append(chosen)


def test_fault_084_a_prompt_longer_than_the_context_is_refused_with_both_numbers(generator):
    with pytest.raises(InputError) as error:
        generator.generate("x" * 30)
    assert str(error.value) == "prompt has 30 tokens, context is 24; use --truncate"
    with pytest.raises(InputError, match="prompt 2 has 25 tokens, context is 24"):
        generator.generate(["ok", "y" * 25])


def test_fault_084_truncate_keeps_the_last_tokens(generator):
    long = "0123456789" * 4
    assert greedy(generator, long, truncate=True) == greedy(generator, long[-24:])


def test_a_context_of_one_token_still_generates():
    generator = TextGenerator(random_model(ModelConfig(1, 1, 16, 1)), load_tokenizer("byte"))
    (completion,) = greedy(generator, "a", count=5)[0]
    assert len(completion.ids) == 5


# ---- rows


@pytest.mark.parametrize("rows", [2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_text_is_the_same_bits_whatever_the_other_rows_hold(dtype, rows):
    torch.set_num_threads(2)  # which thread a row falls to must not matter
    config = ModelConfig(n_layer=1, n_head=4, n_embd=64, block_size=32)
    generator = TextGenerator(random_model(config).to(dtype), load_tokenizer("byte"))
    neighbours = [["bb" * 9, "c", "dd"], [f"{n} neighbour" for n in range(4)]]
    seen = set()
    for before in neighbours:
        for after in (["tail"], []):
            prompts = [*before, "the same prompt", *after]
            ids = [*range(len(before)), "same", *range(50, 50 + len(after))]
            completions = generator.generate(
                prompts, ids, max_new_tokens=24, seed=3, rows=rows, ignore_eot=True, logprobs=True
            )
            (completion,) = completions[len(before)]
            seen.add((tuple(completion.ids), tuple(completion.logprobs)))
    assert len(seen) == 1


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_are_refilled_and_results_stay_in_the_order_of_the_prompts(generator, rows):
    prompts = [f"prompt {n}" for n in range(5)]  # their texts cross the context's edge
    together = greedy(generator, prompts, count=30, rows=rows, num_samples=2)
    assert together == [[greedy(generator, prompt, count=30, rows=rows)[0][0]] * 2 for prompt in prompts]


def test_the_cache_has_no_more_rows_than_asked_for_however_many_prompts_wait(generator, monkeypatch):
    made, original = [], step.KVCache
    monkeypatch.setattr(step, "KVCache", lambda config, rows, *rest: made.append(rows) or original(config, rows, *rest))
    greedy(generator, ["x"] * 20, count=2, rows=2)
    greedy(generator, ["x"] * 20, count=2)
    assert made == [2, 8]
    backend = make_backend("eager", generator.model)
    assert [backend.slots(rows) for rows in (1, 3, 4, 5, 8, 9)] == [1, 3, 4, 8, 8, 12]


def test_fault_087_what_damaged_weights_left_in_the_cache_does_not_reach_a_later_text():
    generator = TextGenerator(random_model(), load_tokenizer("byte"))
    expected = greedy(generator, "abc")
    weight = generator.model.blocks[0].attn.qkv.weight
    whole = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(math.nan)
    with pytest.raises(NonFiniteError):
        greedy(generator, "abcdefghijkl")
    with torch.no_grad():
        weight.copy_(whole)
    assert greedy(generator, "abc") == expected


def test_an_interrupt_within_a_step_spoils_no_later_text(monkeypatch):
    generator, decode, interrupts = TextGenerator(random_model(), load_tokenizer("byte")), Backend.decode, []

    def interrupted(self, ids, cache):
        logits = decode(self, ids, cache)
        if interrupts:
            raise interrupts.pop()
        return logits

    monkeypatch.setattr(Backend, "decode", interrupted)
    expected = [greedy(generator, prompts, rows=4) for prompts in (["ab"] * 5, ["abc"])]
    interrupts.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        greedy(generator, ["ab"] * 5, rows=4)
    assert [greedy(generator, prompts, rows=4) for prompts in (["abc"], ["ab"] * 5)] == expected[::-1]


# ---- randomness


def test_fault_090_the_same_seed_and_settings_give_the_same_text(generator):
    first = generator.generate("abc", seed=7, num_samples=3)
    assert generator.generate("abc", seed=7, num_samples=3) == first
    assert generator.generate("abc", seed=8, num_samples=3) != first
    assert len({completion.text for completion in first[0]}) == 3


def test_fault_090_a_sample_does_not_depend_on_the_number_of_samples(generator):
    five = generator.generate("abc", seed=7, num_samples=5, max_new_tokens=60)[0]
    assert generator.generate("abc", seed=7, num_samples=2, max_new_tokens=60)[0] == five[:2]


def test_fault_090_in_bf16_a_sample_does_not_depend_on_the_number_of_samples_at_the_same_rows():
    config = ModelConfig(n_layer=2, n_head=4, n_embd=64, block_size=32)
    generator = TextGenerator(random_model(config).bfloat16(), load_tokenizer("byte"))
    settings = {"seed": 7, "rows": 4, "max_new_tokens": 40, "ignore_eot": True, "logprobs": True}
    six = generator.generate("abc", num_samples=6, **settings)[0]
    for count in (1, 2, 3):
        assert generator.generate("abc", num_samples=count, **settings)[0] == six[:count]


def test_fault_090_a_text_follows_its_prompt_id_and_not_its_place(generator):
    settings = {"seed": 7, "rows": 2, "max_new_tokens": 30}
    (first,), (second,) = generator.generate(["abc", "abc"], **settings)
    assert first != second
    assert generator.generate(["abc", "abc"], [2, 1], **settings) == [[second], [first]]


def test_a_random_seed_is_drawn_where_none_is_given(generator):
    assert generator.params().seed != generator.params().seed
    assert generator.generate("abc") != generator.generate("abc")


def test_texts_longer_than_one_block_of_draws_go_on_with_new_draws(generator):
    count = 2 * DRAWS_AHEAD + 10
    (completion,) = generator.generate("a", max_new_tokens=count, seed=1, ignore_eot=True, top_p=1.0, temperature=9.0)[
        0
    ]
    assert len(completion.ids) == count
    assert completion.ids[:DRAWS_AHEAD] != completion.ids[DRAWS_AHEAD : 2 * DRAWS_AHEAD]


def test_generating_leaves_the_global_generator_and_the_training_state_alone(generator):
    model, state = generator.model, torch.random.get_rng_state()
    model.train()
    generator.generate("abc", max_new_tokens=5)
    "".join(generator.stream("abc", max_new_tokens=5))
    assert model.training
    assert torch.equal(state, torch.random.get_rng_state())
    model(torch.tensor([[1, 2]]), torch.tensor([[2, 3]])).sum().backward()
    assert model.token.weight.grad is not None
    model.zero_grad(set_to_none=True)
    model.eval()


def test_fault_094_dropout_is_off_while_generating_with_a_model_in_training():
    config = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=24, dropout=0.5)
    generator = TextGenerator(random_model(config).train(), load_tokenizer("byte"))
    assert greedy(generator, "abc") == greedy(generator, "abc")


def test_fault_094_tensors_do_not_pile_up_over_many_tokens_and_carry_no_graph(generator):
    def tensors():
        gc.collect()
        return [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]

    events = generator.run(["abc"], generator.params(max_new_tokens=10_000, ignore_eot=True, seed=1))
    counts = [len(tensors()) for n, _ in zip(range(801), events, strict=False) if n in (30, 800)]
    assert counts[0] == counts[1]
    assert not any(found.grad_fn for found in tensors())


# ---- where a text begins and ends


def scripted(ids):
    """A TextGenerator whose model chooses exactly these ids, one after another, then end-of-text for ever."""
    generator = TextGenerator(random_model(ModelConfig(1, 1, 16, 64)), load_tokenizer("byte"))
    backend = make_backend("eager", generator.model)
    backend.decode = scripted_decode(ids)
    generator.made, generator.weights = {"eager": backend}, weights_now(generator.model)
    return generator


def test_end_of_text_ends_the_text_and_is_not_in_it():
    (completion,) = scripted(b"abc").generate("x")[0]
    assert (completion.text, completion.ids, completion.finish_reason) == ("abc", list(b"abc"), "stop")


def test_the_length_ends_the_text():
    (completion,) = scripted(b"abcdef").generate("x", max_new_tokens=4)[0]
    assert (completion.text, completion.finish_reason, completion.logprobs) == ("abcd", "length", None)


def test_ignore_eot_never_chooses_end_of_text(generator):
    model = random_model()
    with torch.no_grad():
        model.ln_f.bias.copy_(model.token.weight[EOT] * 100)  # end-of-text is by far the likeliest
    generator = TextGenerator(model, generator.tokenizer)
    assert generator.generate("abc", max_new_tokens=20)[0][0].ids == []
    (completion,) = generator.generate("abc", max_new_tokens=20, ignore_eot=True)[0]
    assert (len(completion.ids), completion.finish_reason) == (20, "length")


@pytest.mark.parametrize(
    "stop, text",
    [("lo w", "hel"), (("zzz", "wor", "lo world!"), "hello "), ("!", "hello world"), ("héllo", "hello world!")],
)
def test_a_stop_string_across_token_borders_ends_the_text_before_it(stop, text):
    (completion,) = scripted(b"hello world!").generate("x", stop=stop)[0]
    assert (completion.text, completion.finish_reason) == (text, "stop")
    assert "".join(scripted(b"hello world!").stream("x", stop=stop)) == text


def test_fault_085_an_empty_prompt_starts_from_end_of_text(generator):
    assert greedy(generator, "") == greedy(generator, "<|endoftext|>", allow_special=True)


def test_fault_085_no_new_tokens_is_an_empty_text_and_a_negative_number_is_refused(generator):
    (completion,) = generator.generate("abc", max_new_tokens=0)[0]
    assert (completion.text, completion.ids, completion.finish_reason) == ("", [], "length")
    with pytest.raises(InputError, match="max_new_tokens -1"):
        generator.generate("abc", max_new_tokens=-1)


def test_fault_091_end_of_text_in_a_prompt_is_ordinary_text_unless_allowed(generator):
    params = generator.params()
    assert len(generator.encode("<|endoftext|>", "prompt", params)) == 13
    params = generator.params(allow_special=True)
    assert generator.encode("<|endoftext|>", "prompt", params).tolist() == [EOT]


def test_all_bad_settings_are_refused_in_one_message_and_unknown_ones_get_a_suggestion(generator):
    with pytest.raises(InputError, match=r"num_samples 0.*rows -1.*seed -5.*stop.*top_p 7"):
        generator.generate("abc", num_samples=0, rows=-1, seed=-5, stop=("",), top_p=7)
    with pytest.raises(InputError, match="unknown setting temperture; perhaps you meant temperature"):
        generator.generate("abc", temperture=1.0)


def test_fault_087_logits_that_are_not_finite_are_an_error_that_names_the_token(generator):
    model = random_model()
    with torch.no_grad():
        model.position.weight[8] = math.nan  # reached by the sixth token after a prompt of four
    with pytest.raises(NonFiniteError, match="non-finite logits at token 6"):
        TextGenerator(model, generator.tokenizer).generate("abcd", ignore_eot=True)


def test_fault_088_ids_that_stand_for_no_text_never_come_out():
    tokenizer = load_tokenizer("byte")
    holed = SimpleNamespace(
        eot=EOT,
        encoding=tokenizer.encoding,
        encode=tokenizer.encode,
        decode_bytes=tokenizer.decode_bytes,
        byte_lengths=lambda: np.array([1] * 256 + [0] * 44),
    )
    model = random_model(vocabulary=300)
    (completion,) = TextGenerator(model, holed).generate(
        "a", max_new_tokens=300, temperature=20.0, top_p=1.0, ignore_eot=True
    )[0]
    assert max(completion.ids) < 256


def test_checkpoint_defaults_stand_in_for_ours_and_give_way_to_settings(generator):
    stored = {"temperature": 0.25, "top_k": 9, "eos_token_id": 256, "do_sample": True, "min_p": "0.5"}
    generator = TextGenerator(generator.model, generator.tokenizer, stored)
    sampling = generator.params(top_k=3).sampling
    assert (sampling.temperature, sampling.top_k, sampling.min_p) == (0.25, 3, 0.0)


# ---- streams


def test_fault_089_a_character_split_over_tokens_gives_no_replacement_character():
    generator = scripted("日本語 😀 done".encode())
    pieces = list(generator.stream("x"))
    assert "".join(pieces) == "日本語 😀 done"
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("stop", [(), ("e", "th")])
def test_a_stream_is_the_text_that_generate_gives(generator, stop):
    settings = {"max_new_tokens": 60, "seed": 4, "stop": stop}
    pieces = list(generator.stream("abc", **settings))
    assert "".join(pieces) == generator.generate("abc", **settings)[0][0].text
    assert len(pieces) > 1 or stop


def test_a_stream_checks_its_settings_before_it_is_read(generator):
    with pytest.raises(InputError, match="temperature"):
        generator.stream("abc", temperature=-1.0)
    with pytest.raises(InputError, match="num_samples"):
        generator.stream("abc", num_samples=2)


def test_an_abandoned_stream_gives_the_model_its_training_state_back(generator):
    generator.model.train()
    stream = generator.stream("abc", ignore_eot=True)
    next(stream)
    stream.close()
    assert generator.model.training
    generator.model.eval()
