"""The file of answers: what it holds after a kill, and one program at a time."""

import json

import pytest

from gpt.errors import InputError, ResourceError
from gpt.generate.answers import Answers, answer_line, open_answers, read_answers
from gpt.generate.prompts import Prompt
from gpt.generate.sequence import Completion

PROMPTS = [
    Prompt("é", "abc\ud800", extra={"topic": "é\u00a0}", "n": [1, None]}),
    Prompt(2, 'the "text": }\n'),
    Prompt(3, ""),
]
SAMPLES = [1, 2, 1]
TEXTS = ["}\n", "", 'x"}', "é"]


def lines():
    prompts = [prompt for prompt, count in zip(PROMPTS, SAMPLES, strict=True) for _ in range(count)]
    completions = [Completion(text, [1, 2], "length", None) for text in TEXTS]
    return [answer_line(*pair) + "\n" for pair in zip(prompts, completions, strict=True)]


def test_wherever_a_file_is_cut_off_its_whole_answers_are_counted(tmp_path):
    out = tmp_path / "o.jsonl"
    assert read_answers(out, PROMPTS, SAMPLES) == Answers(texts=0, total=4)
    with open_answers(out, Answers(0, 4)) as file:
        file.writelines(lines())
    whole = out.read_bytes()
    for cut in range(len(whole) + 1):
        out.write_bytes(whole[:cut])
        texts = whole[:cut].count(b"\n")
        end = sum(len(line) + 1 for line in whole.split(b"\n")[:texts])
        assert read_answers(out, PROMPTS, SAMPLES) == Answers(texts, 4, end, cut)


def test_what_a_kill_has_cut_off_is_replaced(tmp_path):
    out = tmp_path / "o.jsonl"
    out.write_text(lines()[0] + lines()[1][:-3], encoding="utf-8", errors="backslashreplace")
    with open_answers(out, read_answers(out, PROMPTS, SAMPLES)) as file:
        file.writelines(lines()[1:])
    assert [json.loads(line)["text"] for line in out.read_text(encoding="utf-8").splitlines()] == TEXTS


def test_an_answer_ends_with_the_other_fields_of_its_prompt():
    first, second = (json.loads(line) for line in lines()[:2])
    assert list(first) == ["id", "prompt", "text", "tokens", "logprobs", "finish_reason", "topic", "n"]
    assert (first["topic"], first["n"]) == ("é\u00a0}", [1, None])
    assert list(second) == ["id", "prompt", "text", "tokens", "logprobs", "finish_reason"]


@pytest.mark.parametrize("order", [(1, 0, 2), (0, 2), (0, 1, 1, 2)])
def test_answers_to_other_prompts_or_in_another_order_are_refused(tmp_path, order):
    out = tmp_path / "o.jsonl"
    out.write_text("".join(lines()), encoding="utf-8", errors="backslashreplace")
    with pytest.raises(InputError, match=r"o\.jsonl:\d: not an answer to prompt"):
        read_answers(out, [PROMPTS[n] for n in order], [SAMPLES[n] for n in order])


def test_two_programs_do_not_write_to_one_file_of_answers(tmp_path):
    out = tmp_path / "o.jsonl"
    answers = read_answers(out, PROMPTS, SAMPLES)
    with open_answers(out, answers) as file:
        with pytest.raises(ResourceError, match="another program is writing to it"), open_answers(out, answers):
            pass
        file.write(lines()[0])
    with pytest.raises(ResourceError, match="another program has changed it meanwhile"), open_answers(out, answers):
        pass
    assert read_answers(out, PROMPTS, SAMPLES).texts == 1
