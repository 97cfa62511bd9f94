"""TextGenerator: settings, prompts, seeds, streams, and a model that changes or is in training."""

import os
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from generation_helpers import EOT, generator_of, greedy, random_model, scripted
from training_helpers import save_step

from gpt.errors import InputError
from gpt.generate.generator import TextGenerator, rows_and_steps
from gpt.generate.sequence import GenerationParams
from gpt.model import ModelConfig
from gpt.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def generator():
    return generator_of(random_model())


# ---- prompts and settings


def test_fault_084_a_prompt_longer_than_the_context_is_refused_with_both_numbers(generator):
    with pytest.raises(InputError) as error:
        generator.generate("x" * 30)
    assert str(error.value) == "prompt has 30 tokens, context is 24; use --truncate"
    with pytest.raises(InputError, match="prompt 2 has 25 tokens, context is 24"):
        generator.generate(["ok", "y" * 25])


def test_fault_084_truncate_keeps_the_last_tokens(generator):
    long = "0123456789" * 4
    assert greedy(generator, long, truncate=True) == greedy(generator, long[-24:])


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


def test_fault_088_ids_that_stand_for_no_text_never_come_out():
    tokenizer = load_tokenizer("byte")
    holed = SimpleNamespace(
        eot=EOT,
        stops=(EOT,),
        encoding=tokenizer.encoding,
        encode_prompt=tokenizer.encode_prompt,
        decode_bytes=tokenizer.decode_bytes,
        byte_lengths=lambda: np.array([1] * 256 + [0] * 44),
    )
    model = random_model(vocabulary=300)
    (completion,) = TextGenerator(model, holed).generate(
        "a", max_new_tokens=300, temperature=20.0, top_p=1.0, ignore_eot=True
    )[0]
    assert max(completion.ids) < 256


def test_checkpoint_defaults_stand_in_for_ours_and_give_way_to_settings(generator):
    stored = {
        "temperature": 0.25,
        "top_k": 9,
        "eos_token_id": 256,
        "do_sample": True,
        "min_p": "0.5",
        "no_repeat_ngram_size": 3,
    }
    generator = TextGenerator(generator.model, generator.tokenizer, stored)
    sampling = generator.params(top_k=3).sampling
    assert (sampling.temperature, sampling.top_k, sampling.min_p, sampling.no_repeat_ngram) == (0.25, 3, 0.0, 3)


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


# ---- a model in training, in inference mode, or changed


def test_an_abandoned_stream_gives_the_model_its_training_state_back(generator):
    generator.model.train()
    stream = generator.stream("abc", ignore_eot=True)
    next(stream)
    stream.close()
    assert generator.model.training
    generator.model.eval()


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


@pytest.mark.parametrize("name", ["eager", "native"])
def test_weights_that_change_between_two_texts_change_the_second(kernels, name):
    generator, other = generator_of(random_model(), name), random_model(seed=1)
    greedy(generator, "abc")
    with torch.no_grad():
        for parameter, value in zip(generator.model.parameters(), other.parameters(), strict=True):
            parameter.copy_(value)  # as training does
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


def test_the_precision_is_chosen_for_the_model_and_the_texts_to_come(tmp_path, monkeypatch):
    """With the library that will run them: built before the choice, where the texts are long enough for it."""
    steps, choices = [], []
    module = "gpt.generate.generator"
    monkeypatch.setattr(f"{module}.decode_library", lambda name, count, *_: steps.append((name, count)) or "library")
    monkeypatch.setattr(f"{module}.pick_decode_dtype", lambda *args: choices.append(args) or torch.bfloat16)
    monkeypatch.setattr(f"{module}.note_slow_int8", lambda *args: choices.append(args[1:]))
    folder = save_step(tmp_path, 1, random_model())
    texts = [GenerationParams(max_new_tokens=100, num_samples=3)] * 2
    model = TextGenerator.load(folder, expected=texts).model
    assert TextGenerator.load(folder, quantize="int8", expected=texts).model.dtype == model.dtype == torch.bfloat16
    assert TextGenerator.load(folder, dtype="fp32", expected=texts).model.dtype == torch.float32
    assert steps == [("auto", 100)] * 3
    shape = model.config, model.vocab_size
    assert choices == [(*shape, False, 6, "library"), (*shape, True, 6, "library"), (6, "library")]
    TextGenerator.load(folder, backend="eager")
    assert steps[3:] == [("eager", 0)] and choices[3] == (*shape, False, 1, "library")


@pytest.mark.parametrize(
    ("settings", "rows", "steps"),
    [([], 1, 0), ([{}], 1, 200), ([{"num_samples": 20}] * 2, 8, 1000), ([{"rows": 16, "num_samples": 32}], 16, 400)],
)
def test_rows_and_steps_follow_from_the_settings_of_the_texts(settings, rows, steps):
    params = [GenerationParams(max_new_tokens=200, **own) for own in settings]
    assert rows_and_steps(params, 8) == (rows, steps)
    assert rows_and_steps(params, 0)[0] >= 1


def test_a_model_whose_weights_were_made_in_inference_mode_generates():
    with torch.inference_mode():
        generator = generator_of(random_model())
        expected = greedy(generator, "abc")
    assert greedy(generator, "abc") == expected == greedy(generator_of(random_model()), "abc")


def test_the_cache_of_the_last_texts_is_used_again_but_never_by_two_at_once(generator):
    first, second = (
        generator.stream("abc", seed=1, max_new_tokens=40),
        generator.stream("xyz", seed=2, max_new_tokens=40),
    )
    mixed = [piece for pair in zip(first, second, strict=False) for piece in pair]
    fresh = generator_of(generator.model)
    for prompt, seed, begun in (("abc", 1, "".join(mixed[::2])), ("xyz", 2, "".join(mixed[1::2]))):
        assert len(begun) > 10
        assert fresh.generate(prompt, seed=seed, max_new_tokens=40)[0][0].text.startswith(begun)
    decoder = fresh.idle_decoder
    fresh.generate("abc", max_new_tokens=3)
    assert fresh.idle_decoder is decoder


@pytest.mark.parametrize("backend", ["eager", "native"])
def test_a_stream_that_ends_after_the_weights_have_changed_leaves_no_earlier_weights_behind(kernels, backend):
    generator, other = generator_of(random_model().bfloat16(), backend), random_model(seed=1).bfloat16()
    stream = generator.stream("abc", ignore_eot=True)
    next(stream)
    with torch.no_grad():
        for parameter, value in zip(generator.model.parameters(), other.parameters(), strict=True):
            parameter.copy_(value)
    greedy(generator, "abc")
    stream.close()
    assert greedy(generator, "abc") == greedy(generator_of(other, backend), "abc")


# ---- fork


def generate_and_fork():
    """In a process of its own: generates with two threads, forks, generates the same there, and prints both."""
    torch.set_num_threads(2)
    generator = generator_of(random_model(ModelConfig(2, 4, 256, 256)))
    generator.generate(["x" * 200] * 4, max_new_tokens=4, seed=1)  # large enough products for two threads

    def text():
        return generator.generate(["ab"], max_new_tokens=20, temperature=0)[0][0].text

    print(repr(text()), flush=True)
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a child that waits for threads that it does not have is killed
        print(repr(text()), torch.get_num_threads(), flush=True)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def test_fault_130_a_process_forked_after_generating_with_several_threads_generates_with_one(processes):
    done = processes.run("test_generator.generate_and_fork")
    assert done.code == 0, done.stderr
    parent, child, code = done.stdout.splitlines()
    assert (child, code) == (f"{parent} 1", "0")


# ---- prompts of ids


def test_prompts_of_ids_are_continued_as_they_are_up_to_end_of_text(generator):
    prompts = [[*b"abc"], [EOT], [0xC3]]
    completions = generator.continue_ids(prompts, max_new_tokens=12, temperature=0.0)
    for ids, completion in zip(prompts, completions, strict=True):
        chosen = []
        while len(chosen) < 12 and (not chosen or chosen[-1] != EOT):
            with torch.no_grad():
                chosen.append(int(generator.model(torch.tensor([ids + chosen]))[0, :257].argmax()))
        assert completion.ids == [i for i in chosen if i != EOT]
