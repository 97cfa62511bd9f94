"""Where a text begins and ends, and the order of texts."""

import pytest
import torch
from generation_helpers import EOT, generator_of, greedy, random_model, scripted

from gpt.errors import InputError
from gpt.generate.sequence import GenerationParams, Sequence, in_order
from gpt.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def generator():
    return generator_of(random_model())


def test_end_of_text_ends_the_text_and_is_not_in_it():
    (completion,) = scripted(b"abc").generate("x")[0]
    assert (completion.text, completion.ids, completion.finish_reason) == ("abc", list(b"abc"), "stop")


def test_the_length_ends_the_text():
    (completion,) = scripted(b"abcdef").generate("x", max_new_tokens=4)[0]
    assert (completion.text, completion.finish_reason, completion.logprobs) == ("abcd", "length", None)


def test_ignore_eot_never_chooses_end_of_text():
    model = random_model()
    with torch.no_grad():
        model.ln_f.bias.copy_(model.token.weight[EOT] * 100)  # end-of-text is by far the likeliest
    generator = generator_of(model)
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


def test_pieces_come_in_the_order_of_the_texts_whatever_the_order_of_the_tokens():
    tokenizer = load_tokenizer("byte")
    texts = [Sequence(n, n, [EOT], n, 0, GenerationParams(max_new_tokens=n), tokenizer) for n in (0, 1, 2, 3)]

    def events():
        yield texts[3], texts[3].take(ord("a"), 0.0, [])
        yield texts[2], texts[2].take(ord("b"), 0.0, [])
        yield texts[0], texts[0].finish("length")
        yield texts[3], texts[3].take(ord("c"), 0.0, [])
        yield texts[2], texts[2].take(ord("d"), 0.0, [])
        yield texts[1], texts[1].take(ord("e"), 0.0, [])
        yield texts[3], texts[3].take(ord("f"), 0.0, [])

    ordered = [(sequence.number, piece, sequence.finish_reason) for sequence, piece in in_order(events())]
    assert ordered == [(0, "", "length"), (1, "e", "length"), (2, "bd", "length"), (3, "ac", None), (3, "f", "length")]


def test_the_window_is_the_end_of_prompt_and_text():
    sequence = Sequence(0, 0, [1, 2, 3], 1, 0, GenerationParams(), load_tokenizer("byte"))
    for chosen in (4, 5):
        sequence.take(chosen, 0.0, [])
    assert [sequence.window(length) for length in (1, 2, 3, 5)] == [[5], [4, 5], [3, 4, 5], [1, 2, 3, 4, 5]]
