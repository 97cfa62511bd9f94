"""sample.py: what stands on stdout, stderr and in files, and what bad input ends in."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from generation_helpers import replace_decode, scripted_decode, small_generator, start_fresh

import sample
from gpt.errors import run_main
from gpt.generate import prompts as prompts_module
from gpt.model import ModelConfig
from gpt.text.examples import chat_template

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def generator():
    return small_generator(ModelConfig(2, 2, 32, 64))


@pytest.fixture
def cli(generator, monkeypatch, capsys):
    """run(*flags, stdin=b"") -> (exit code, stdout, stderr), with a small random model as every checkpoint."""
    monkeypatch.setattr(sample.TextGenerator, "load", lambda *_: generator)

    def run(*flags, stdin=b""):
        monkeypatch.setattr(sys, "argv", ["sample.py", "checkpoint", *flags])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as stop:
            run_main(sample.main)
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return run


def test_the_texts_to_come_are_known_when_the_model_is_loaded(cli, generator, monkeypatch, tmp_path):
    """By them the precision is chosen, and whether to wait for the C++ kernels."""
    seen = []
    monkeypatch.setattr(sample.TextGenerator, "load", lambda *args: seen.append(args[-1]) or generator)
    (tmp_path / "asked.txt").write_text("a\nb\n")
    assert cli("--prompt", "a", "--num_samples", "3", "--max_new_tokens", "5")[0] == 0
    assert cli("--prompts", str(tmp_path / "asked.txt"), "--max_new_tokens", "7")[0] == 0
    settings = [[(own.num_samples, own.max_new_tokens) for own in expected] for expected in seen]
    assert settings == [[(3, 5)], [(1, 7), (1, 7)]]


@pytest.fixture
def no_load(monkeypatch):
    def load(*_):
        raise AssertionError("the model was loaded before the settings were checked")

    monkeypatch.setattr(sample.TextGenerator, "load", load)


def says(monkeypatch, text):
    """Lets every model answer `text`, a byte a token, whatever it is asked."""
    replace_decode(monkeypatch, scripted_decode(text.encode()))


# ---- text on stdout


def test_stdout_shows_prompt_and_text_and_a_line_between_samples(cli, generator):
    flags = ("--num_samples", "3", "--max_new_tokens", "12", "--seed", "5")
    code, out, err = cli("--prompt", "To be", *flags)
    texts = [c.text for c in generator.generate("To be", num_samples=3, max_new_tokens=12, seed=5)[0]]
    assert code == 0 and err == ""
    assert out == "\n---\n".join("To be" + text for text in texts) + "\n"


def test_streamed_output_is_the_same_as_output_at_the_end(cli):
    flags = ("--prompt", "abc", "--num_samples", "3", "--max_new_tokens", "20", "--seed", "5")
    assert cli(*flags, "--stream", "on") == cli(*flags, "--stream", "off")


def test_a_random_seed_is_printed_and_repeats_the_text(cli):
    _, out, err = cli("--prompt", "abc")
    seed = err.strip().removeprefix("seed: ")
    assert seed.isdigit()
    assert cli("--prompt", "abc", "--seed", seed) == (0, out, "")


def test_without_a_prompt_it_is_what_is_piped_in(cli):
    piped = cli("--seed", "1", stdin="To bé\n".encode())
    assert piped == cli("--seed", "1", "--prompt", "To bé", stdin=b"ignored")
    assert cli("--seed", "1", stdin=b"") == cli("--seed", "1", "--prompt", "")


def test_fault_085_no_new_tokens_prints_the_prompt(cli):
    assert cli("--prompt", "abc", "--max_new_tokens", "0", "--seed", "1") == (0, "abc\n", "")


def test_several_stop_strings_can_be_given(cli, generator, monkeypatch):
    says(monkeypatch, "hello world")
    assert cli("--prompt", "", "--stop", "wor", "o ", "--seed", "1")[1] == "hell\n"


@pytest.mark.parametrize("text", ["--- x", "--", "---", "-- a", "-x"])
def test_a_prompt_may_begin_with_dashes(cli, text):
    assert cli("--prompt", text, "--max_new_tokens", "0", "--seed", "1") == (0, f"{text}\n", "")


@pytest.mark.parametrize(
    "stop, text",
    [
        (["--"], "a"),
        (["---"], "a--b"),
        ([r"\n"], "a--b---c"),
        ([r"\n\t"], "a--b---c\nd"),
        ([r"\\n"], "a--b---c\nd\n\te"),
    ],
)
def test_stop_strings_may_be_dashes_and_hold_escapes(cli, monkeypatch, stop, text):
    says(monkeypatch, "a--b---c\nd\n\te\\nf")
    assert cli("--prompt", "", "--seed", "1", "--stop", *stop) == (0, text + "\n", "")
    says(monkeypatch, "a--b---c\nd\n\te\\nf")
    assert cli("--prompt", "", "--stop", *stop, "zzz", "--seed", "1") == (0, text + "\n", "")


@pytest.mark.parametrize("prompt", [r"a\nb\\c", r"C:\temp\new", r"\\frac{1}{2}"])
@pytest.mark.parametrize("terminal", [True, False])
def test_escapes_are_read_in_a_prompt_only_with_escape_which_a_terminal_offers(cli, monkeypatch, prompt, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    flags = ("--prompt", prompt, "--max_new_tokens", "0", "--seed", "1")
    code, out, err = cli(*flags)
    assert (code, out) == (0, prompt + "\n")
    offered = terminal and (r"\n" in prompt or r"\t" in prompt)
    assert ("--escape reads them" in err) == offered
    read = prompt.replace(r"\\", "\0").replace(r"\n", "\n").replace(r"\t", "\t").replace("\0", "\\")
    assert cli(*flags, "--escape") == (0, read + "\n", "")


ESCAPES = "ok\x1b[2J\x07\r\u202e\x9b1mé\n\tend"


@pytest.mark.parametrize("stream", ["on", "off"])
def test_fault_110_control_characters_are_escaped_on_a_terminal(cli, generator, monkeypatch, stream):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    says(monkeypatch, ESCAPES)
    _, out, _ = cli("--prompt", "\x1b]52", "--seed", "1", "--stream", stream)
    assert out == "\\x1b]52ok\\x1b[2J\\x07\\x0d\\u202e\\x9b1mé\n\tend\n"


@pytest.mark.parametrize("stream", ["on", "off"])
def test_fault_110_arabic_persian_and_emoji_reach_a_terminal_as_they_are(cli, generator, monkeypatch, stream):
    text = "\u200fنمی\u200cخواهم\u200e (1) 👩\u200d👧"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    says(monkeypatch, text)
    assert cli("--prompt", "", "--seed", "1", "--stream", stream)[1] == text + "\n"


@pytest.mark.parametrize("flags", [[], ["--raw"]])
def test_fault_110_the_interactive_mode_escapes_control_characters_too(cli, generator, monkeypatch, flags):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    says(monkeypatch, "\x1b[2Jé")
    shown = "\x1b[2Jé\n" if flags else "\\x1b[2Jé\n"
    assert cli("--interactive", "--seed", "1", *flags, stdin=b"a\n") == (0, shown, "")


@pytest.mark.parametrize("terminal, flags", [(True, ["--raw"]), (False, [])])
def test_fault_110_raw_and_a_pipe_get_control_characters_as_they_are(cli, generator, monkeypatch, terminal, flags):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    says(monkeypatch, ESCAPES)
    assert cli("--prompt", "", "--seed", "1", *flags)[1] == ESCAPES + "\n"


# ---- JSONL


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def test_a_text_file_of_prompts_gives_a_json_line_each_in_order(cli, generator, tmp_path):
    source, out = tmp_path / "prompts.txt", tmp_path / "answers é.jsonl"
    source.write_bytes("\ufeffOnce\r\n\r\nüpon a\u2028time\n".encode())
    code, stdout, _ = cli("--prompts", str(source), "--out", str(out), "--seed", "3", "--logprobs")
    assert (code, stdout) == (0, "")
    prompts = ["Once", "", "üpon a\u2028time"]
    expected = generator.generate(prompts, seed=3, logprobs=True)
    for number, (line, (completion,)) in enumerate(zip(read_lines(out), expected, strict=True), 1):
        assert list(line) == ["id", "prompt", "text", "tokens", "logprobs", "finish_reason"]
        assert (line["id"], line["prompt"], line["text"]) == (number, prompts[number - 1], completion.text)
        assert (line["tokens"], line["logprobs"]) == (completion.ids, completion.logprobs)
        assert line["finish_reason"] == completion.finish_reason


def test_jsonl_prompts_keep_their_ids_and_their_texts_follow_the_ids(cli, tmp_path):
    source, swapped = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    lines = ['{"id": "x", "prompt": "abc"}', '{"prompt": "abc"}', '{"id": -7, "prompt": "abc\\ud800"}']
    source.write_text("\n".join(lines))
    swapped.write_text("\n".join(reversed(lines)))
    first = [json.loads(line) for line in cli("--prompts", str(source), "--seed", "3")[1].splitlines()]
    second = [json.loads(line) for line in cli("--prompts", str(swapped), "--seed", "3")[1].splitlines()]
    assert [line["id"] for line in first] == ["x", 2, -7]
    assert first == second[::-1]
    assert len({line["text"] for line in first}) == 3
    assert first[0]["logprobs"] is None


def test_many_prompts_and_samples_come_out_in_order_though_they_end_at_different_times(cli, generator, tmp_path):
    source, prompts = tmp_path / "prompts.txt", [f"prompt {n}" for n in range(7)]
    source.write_text("\n".join(prompts))
    flags = ("--rows", "3", "--num_samples", "2", "--stop", "e", "a", "--seed", "3", "--max_new_tokens", "40")
    lines = [json.loads(line) for line in cli("--prompts", str(source), *flags)[1].splitlines()]
    completions = generator.generate(prompts, rows=3, num_samples=2, stop=("e", "a"), seed=3, max_new_tokens=40)
    assert [line["text"] for line in lines] == [c.text for samples in completions for c in samples]
    assert [line["id"] for line in lines] == [n for n in range(1, 8) for _ in range(2)]


def test_one_prompt_can_go_to_a_jsonl_file_too_and_replaces_what_is_in_it(cli, tmp_path):
    (tmp_path / "o.jsonl").write_text("anything")
    assert cli("--prompt", "abc", "--out", str(tmp_path / "o.jsonl"), "--seed", "1")[:2] == (0, "")
    assert [line["prompt"] for line in read_lines(tmp_path / "o.jsonl")] == ["abc"]


def test_the_likeliest_tokens_stand_in_the_lines_only_where_they_are_asked_for(cli, generator, tmp_path):
    (tmp_path / "p.txt").write_text("abc\n")
    flags = ("--prompts", str(tmp_path / "p.txt"), "--seed", "3", "--max_new_tokens", "5")
    assert "top_logprobs" not in json.loads(cli(*flags)[1])
    line = json.loads(cli(*flags, "--top_logprobs", "2")[1])
    [[completion]] = generator.generate(["abc"], seed=3, max_new_tokens=5, top_logprobs=2)
    assert [[tuple(pair) for pair in place] for place in line["top_logprobs"]] == completion.top_logprobs
    assert [len(place) for place in line["top_logprobs"]] == [2] * len(line["tokens"])


def test_settings_of_a_prompt_go_before_the_flags_and_hold_for_it_alone(cli, generator, tmp_path):
    own = [
        {},
        {"max_new_tokens": 7, "ignore_eot": True},
        {"temperature": 0, "repetition_penalty": 1.5},
        {"top_k": 3, "top_p": 0.5, "min_p": 0.25, "seed": 11},
        {"stop": "e", "num_samples": 3},
        {"stop": ["a", "i"]},
        {},
    ]
    lines = [json.dumps({"id": f"n{n}", "prompt": "abc", **settings}) for n, settings in enumerate(own)]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    flags = ("--rows", "4", "--seed", "3", "--max_new_tokens", "30", "--temperature", "1.5", "--logprobs")
    code, out, _ = cli("--prompts", str(tmp_path / "p.jsonl"), *flags)
    assert code == 0
    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer["id"] for answer in answers] == ["n0", "n1", "n2", "n3", "n4", "n4", "n4", "n5", "n6"]
    for n, settings in enumerate(own):
        given = {"rows": 4, "seed": 3, "max_new_tokens": 30, "temperature": 1.5} | settings
        [completions] = generator.generate(["abc"], prompt_ids=[f"n{n}"], **given)
        assert [a["tokens"] for a in answers if a["id"] == f"n{n}"] == [c.ids for c in completions]


def test_without_a_seed_one_is_printed_that_repeats_all_answers(cli, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "abc"}\n{"prompt": "abc", "max_new_tokens": 9}\n')
    _, out, err = cli("--prompts", str(tmp_path / "p.jsonl"))
    seed = re.search(r"seed: (\d+)", err)[1]
    assert cli("--prompts", str(tmp_path / "p.jsonl"), "--seed", seed)[1] == out


# ---- conversations


def learn_messages(generator, monkeypatch):
    """Gives the generator the tokenizer of a model that has learned from messages."""
    tokenizer = generator.tokenizer.with_chat_template(chat_template(generator.tokenizer))
    monkeypatch.setattr(generator, "tokenizer", tokenizer)


def test_a_file_of_conversations_is_answered_and_goes_on_where_it_was_cut_off(cli, generator, monkeypatch, tmp_path):
    out, messages = tmp_path / "answers.jsonl", [{"role": "user", "content": "Hi\ud800"}]
    flags = ("--prompts", str(tmp_path / "p.jsonl"), "--out", str(out), "--seed", "1", "--max_new_tokens", "5")
    write = [{"messages": messages, "id": n} for n in "ab"] + [{"prompt": "plain"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in write))
    code, _, err = cli(*flags)
    assert code == 2
    assert "error: prompt a: this model has not learned from messages" in err
    learn_messages(generator, monkeypatch)
    assert cli(*flags)[0] == 0
    whole = out.read_bytes()
    first, second, plain = [json.loads(line) for line in whole.splitlines()]
    prompt, settings = "<|endoftext|>user\nHi\ufffd<|endoftext|>assistant\n", {"seed": 1, "max_new_tokens": 5}
    [[answer]] = generator.generate(prompt, ["a"], allow_special=True, **settings)
    assert first["text"] == answer.text and "prompt" not in first
    assert (first["messages"], second["id"], plain["prompt"]) == (messages, "b", "plain")
    out.write_bytes(whole[: whole.index(b"\n") + 30])
    assert cli(*flags)[0] == 0
    assert out.read_bytes() == whole


def test_a_chat_is_typed_and_answered(cli, generator, monkeypatch):
    learn_messages(generator, monkeypatch)
    replace_decode(monkeypatch, scripted_decode([*b"Hello", 256, *b"Bye", 256]))
    flags = ("--chat", "--prompt", "Hi", "--seed", "1", "--max_new_tokens", "8")
    assert cli(*flags, stdin=b"See you\n") == (0, "Hello\nBye\n", "")


# ---- bad input


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("absent.txt", None, "absent.txt: No such file or directory"),
        ("bytes.txt", b"abc\n\xff", r"bytes.txt: invalid UTF-8 at byte 4 \(0xff\)"),
        ("empty.txt", b"", "empty.txt: no prompts"),
        ("blank.jsonl", b"\n \n", "blank.jsonl: no prompts"),
        (
            "bad.jsonl",
            b'{"prompt": "a"}\n{"prompt": 7}\n',
            'bad.jsonl:2: expected an object with string field "prompt"',
        ),
        ("cut.jsonl", b'{"prompt": "a', "cut.jsonl:1: expected an object"),
        ("deep.jsonl", b"[" * 200_000, "deep.jsonl:1: expected an object"),
        ("id.jsonl", b'{"prompt": "a", "id": 1.5}', 'id.jsonl:1: field "id" must be'),
        ("mark.txt", b"\xef\xbb\xbfabc\n\xfe", r"mark.txt: invalid UTF-8 at byte 7 \(0xfe\)"),
        ("field.jsonl", b'{"prompt": "a", "top_p": 2}', "field.jsonl:1: top_p 2.0 must be above 0"),
    ],
)
def test_fault_092_bad_prompt_files_are_refused_before_loading(cli, no_load, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    code, out, err = cli("--prompts", str(tmp_path / name))
    assert (code, out) == (2, "")
    assert re.search(message, err)


def test_fault_092_a_directory_and_a_file_over_the_cap_are_refused(cli, no_load, tmp_path, monkeypatch):
    assert cli("--prompts", str(tmp_path))[0] == 2
    monkeypatch.setattr(prompts_module, "MOST_BYTES", 1 << 20)
    (tmp_path / "large.txt").write_bytes(b"a" * ((1 << 20) + 1))
    code, _, err = cli("--prompts", str(tmp_path / "large.txt"))
    assert code == 2
    assert "more than 1 MiB" in err


@pytest.mark.parametrize(
    "flags, parts",
    [
        (["--temperature", "-1", "--top_p", "2", "--num_samples", "0"], ["temperature -1", "top_p 2", "num_samples 0"]),
        (["--temperature", "nan"], ["temperature", "nan"]),
        (["--top_p", "inf"], ["top_p", "inf"]),
        (["--max_new_tokens", "-1"], ["max_new_tokens -1"]),
        (["--top_k", "-3", "--threads", "-1"], ["top_k -3", "threads -1"]),
        (["--prompt", "a", "--prompts", "b"], ["--prompt and --prompts exclude"]),
        (["--prompt", "", "--prompts", "b"], ["--prompt and --prompts exclude"]),
        (["--prompts", ""], ["--prompts", "give a readable text or .jsonl file"]),
        (["--prompt", "a", "--logprobs"], ["--logprobs is for JSONL"]),
        (["--prompts", "a", "--stream", "on"], ["--stream on is for text"]),
        (["--prompts", "a", "--raw"], ["--raw is for text"]),
        (["--prompt", "a", "--top_logprobs", "3"], ["--top_logprobs is for JSONL"]),
        (["--interactive", "--prompts", "a", "--out", "b"], ["--interactive and --prompts exclude", "leave out --out"]),
        (["--chat", "--prompts", "a", "--out", "b"], ["--chat and --prompts exclude", "--chat writes to stdout"]),
        (["--chat", "--interactive", "--ignore_eot"], ["leave out --interactive", "leave out --ignore_eot"]),
        (["--chat", "--allow_special", "--num_samples", "2"], ["leave out --allow_special", "leave out --num_samples"]),
        (["--interactive", "--num_samples", "2"], ["one text at a time; leave out --num_samples"]),
        (["--interactive", "--stream", "off", "--logprobs"], ["leave out --stream off", "--logprobs is for JSONL"]),
        (["--escape"], ["--escape is for --prompt"]),
        (["--escape", "--prompts", "a"], ["--escape is for --prompt"]),
        (["--prompt", "--temperature", "1"], ["--prompt: expected one argument"]),
        (["--frequency_penalty", "3"], ["frequency_penalty 3.0 must be from -2 to 2"]),
        (["--num_beams", "3"], ["--num_beams; not offered: no beam search"]),
        (["-p", "abc", "-n", "3"], ["'-n' belongs to no option; here it is --max_new_tokens"]),
        (["--quantize", "int3"], ["int3"]),
        (["--backend", "cuda"], ["cuda"]),
        (["--stop", ""], ["stop must be strings that are not empty"]),
        (["--max_length", "5"], ["--max_new_tokens"]),
        (["--seed", "1.5"], ["seed"]),
    ],
)
def test_fault_085_086_bad_flags_end_in_one_message_before_loading(cli, no_load, flags, parts):
    code, out, err = cli(*flags)
    last = err.strip().splitlines()[-1]
    assert (code, out) == (2, "")
    assert last.startswith("error: ")
    assert all(part in last for part in parts)


def test_an_out_that_cannot_be_written_is_refused_before_loading(cli, no_load, tmp_path):
    (tmp_path / "p.txt").write_text("abc")
    for out in (tmp_path, tmp_path / "absent" / "o.jsonl", tmp_path / "p.txt"):
        code, _, err = cli("--prompts", str(tmp_path / "p.txt"), "--out", str(out))
        assert code == 2
        assert f"error: {out}: " in err
    assert (tmp_path / "p.txt").read_text() == "abc"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_an_output_file_without_space_ends_in_exit_5(cli, tmp_path):
    (tmp_path / "p.txt").write_text("abc")
    for source in (("--prompt", "a"), ("--prompts", str(tmp_path / "p.txt"))):
        code, _, err = cli(*source, "--out", "/dev/full", "--seed", "1")
        assert code == 5
        assert "error: /dev/full: No space left on device" in err


def test_fault_084_a_prompt_longer_than_the_context_ends_in_exit_2_and_truncate_accepts_it(cli):
    code, out, err = cli("--prompt", "x" * 70, "--seed", "1")
    assert (code, out, err) == (2, "", "error: prompt has 70 tokens, context is 64; use --truncate\n")
    assert cli("--prompt", "x" * 70, "--seed", "1", "--truncate")[0] == 0


def test_fault_087_damaged_weights_end_in_exit_4_after_the_text_so_far(cli, generator, monkeypatch):
    decode, calls = scripted_decode("héllo".encode()), []

    def broken(ids, cache):
        calls.append(1)
        return decode(ids, cache) * (float("nan") if len(calls) > 4 else 1)

    replace_decode(monkeypatch, broken)
    code, out, err = cli("--prompt", "x", "--seed", "1")
    assert (code, out) == (4, "xhél\n")
    assert err.startswith("error: non-finite logits at token 5: ")


# ---- a run that goes on with its answers


@pytest.fixture
def job(cli, tmp_path):
    """run(*flags) -> as cli, with five prompts, of which some have several samples, and `answers.jsonl`; its path."""
    lines = [{"id": "é", "prompt": "abc\ud800"}, {"prompt": "x" * 50}, {"prompt": "é\n", "num_samples": 3}]
    lines += [{"prompt": "", "num_samples": 2, "id": 1}, {"prompt": "last", "max_new_tokens": 3}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "answers.jsonl"
    flags = ("--prompts", str(tmp_path / "p.jsonl"), "--out", str(out), "--rows", "2", "--max_new_tokens", "6")
    return lambda *more: cli(*flags, "--temperature", "2", *more), out


def test_wherever_the_file_of_answers_is_cut_off_the_same_command_makes_it_whole_to_the_byte(job):
    run, out = job
    assert run("--seed", "1")[0] == 0
    whole = out.read_bytes()
    assert whole.count(b"\n") == 8
    line_ends = [n + 1 for n, byte in enumerate(whole) if byte == 10]
    for cut in sorted({0, 1, *range(40, len(whole), 61), *line_ends, *(end - 1 for end in line_ends)}):
        out.write_bytes(whole[:cut])
        code, _, err = run("--seed", "1")
        texts = whole[:cut].count(b"\n")
        assert (code, out.read_bytes()) == (0, whole), cut
        rest = "the others follow" if texts < 8 else "delete it to generate them again"
        note = f"info: {out}: holds {texts} of 8 texts; {rest}\n"
        assert err == (note if texts else "")


def test_finished_answers_stay_although_they_were_made_with_another_seed_or_the_prompts_grew(job, tmp_path):
    run, out = job
    run("--seed", "1")
    whole = out.read_bytes()
    second = whole.index(b"\n") + 1
    out.write_bytes(whole[:second])
    run("--seed", "2")
    assert out.read_bytes().startswith(whole[:second])
    assert out.read_bytes() != whole
    with open(tmp_path / "p.jsonl", "a") as file:
        file.write('{"id": "new", "prompt": "more"}\n')
    before = out.read_bytes()
    run("--seed", "2")
    added = out.read_bytes().removeprefix(before)
    assert [json.loads(line)["id"] for line in added.splitlines()] == ["new"]


def test_on_a_terminal_a_bar_counts_the_texts_those_of_before_too_and_tokens_a_second(job, monkeypatch):
    run, out = job
    run("--seed", "1")
    out.write_bytes(out.read_bytes()[:-1])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    err = run("--seed", "1")[2]
    assert "| 7/8 [" in err
    assert "| 8/8 [" in err
    assert re.search(r"\d tok/s\]", err)


def test_where_the_answers_go_to_the_terminal_no_bar_stands_before_the_first(cli, monkeypatch, tmp_path):
    (tmp_path / "p.txt").write_text("a\nb\n")
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    code, out, err = cli("--prompts", str(tmp_path / "p.txt"), "--seed", "1", "--max_new_tokens", "3")
    assert (code, out.count("\n"), err) == (0, 2, "")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    assert "| 2/2 [" in cli("--prompts", str(tmp_path / "p.txt"), "--seed", "1", "--max_new_tokens", "3")[2]


def test_with_all_prompts_answered_nothing_is_loaded(job, no_load, generator, monkeypatch):
    run, out = job
    with monkeypatch.context() as patch:
        patch.setattr(sample.TextGenerator, "load", lambda *_: generator)
        run()
    before = out.read_bytes()
    assert run() == (0, "", f"info: {out}: holds 8 of 8 texts; delete it to generate them again\n")
    assert out.read_bytes() == before


ANSWER = '{"id": %s, "prompt": "%s", "text": "t", "tokens": [], "logprobs": null, "finish_reason": "stop"}\n'


@pytest.mark.parametrize(
    "content, message",
    [
        (ANSWER % (2, "other"), "1: not an answer to prompt 1"),
        (ANSWER % (1, "a") + ANSWER % (9, "a"), "2: not an answer to prompt 2"),
        (ANSWER % ("1.0", "a"), "1: not an answer to prompt 1"),
        ('{"prompt": "a", "id": 1}\n', "1: not an answer to prompt 1"),
        ("my notes\n", "1: not an answer to prompt 1"),
        ("\n", "1: not an answer to prompt 1"),
        ("[" * 100_000 + "\n", "1: not an answer to prompt 1"),
        ("my notes, without a line break", "1: not an answer to prompt 1"),
        ('{"id": 1, "prompt": "b', "1: not an answer to prompt 1"),
        (ANSWER[:-20] % (1, "a") + "\n", "1: not an answer to prompt 1"),
        ((ANSWER % (1, "a")) * 2, "2: not an answer to prompt 2; give the prompts and --num_samples of before"),
        (ANSWER % (1, "a") + ANSWER % (2, "b") * 2, "3: more answers than these prompts have"),
    ],
)
def test_a_file_that_holds_anything_else_is_refused_and_left_alone(cli, no_load, tmp_path, content, message):
    (tmp_path / "p.txt").write_text("a\nb\n")
    out = tmp_path / "o.jsonl"
    out.write_text(content)
    code, _, err = cli("--prompts", str(tmp_path / "p.txt"), "--out", str(out))
    assert (code, out.read_text()) == (2, content)
    assert err.startswith(f"error: {out}:{message}")
    assert err.endswith("; give the prompts and --num_samples of before, or give --out another name\n")


def test_more_samples_than_before_are_refused_and_no_answer_is_lost(cli, generator, tmp_path):
    (tmp_path / "p.txt").write_text("a\nb\n")
    flags = ("--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "o.jsonl"), "--max_new_tokens", "2")
    cli(*flags)
    before = (tmp_path / "o.jsonl").read_bytes()
    code, _, err = cli(*flags, "--num_samples", "2")
    assert (code, (tmp_path / "o.jsonl").read_bytes()) == (2, before)
    assert "o.jsonl:2: not an answer to prompt 1; give the prompts and --num_samples of before" in err


def test_a_spreadsheet_is_answered_with_its_other_columns(cli, tmp_path):
    source, out = tmp_path / "p.csv", tmp_path / "o.jsonl"
    source.write_text("id,topic,prompt,num_samples\r\nx,sea,abc,2\r\ny,,def,\r\n")
    flags = ("--prompts", str(source), "--out", str(out), "--max_new_tokens", "3", "--seed", "1")
    assert cli(*flags)[0] == 0
    whole = out.read_bytes()
    answers = read_lines(out)
    assert [(answer["id"], answer["prompt"], answer.get("topic")) for answer in answers] == [
        ("x", "abc", "sea"),
        ("x", "abc", "sea"),
        ("y", "def", None),
    ]
    out.write_bytes(whole[:-20])
    assert cli(*flags)[0] == 0
    assert out.read_bytes() == whole


# ---- processes of their own


def test_killed_again_and_again_the_file_holds_each_text_once_and_the_bytes_of_one_run(processes, tmp_path):
    prompts = [{"id": f"p{n}", "prompt": "x" * (n % 9), "max_new_tokens": 5 + n * 7 % 40} for n in range(60)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    flags = ("--prompts", tmp_path / "p.jsonl", "--num_samples", 2, "--rows", 3, "--seed", 1, "--ignore_eot", "--out")
    assert processes.run("generation_helpers.sample_after", "", *flags, tmp_path / "whole.jsonl").code == 0
    whole, out = (tmp_path / "whole.jsonl").read_bytes(), tmp_path / "killed.jsonl"
    for share in (0.2, 0.4, 0.6):
        process = processes.start("generation_helpers.sample_after", "", *flags, out)
        while not out.exists() or out.stat().st_size < share * len(whole):
            time.sleep(0.001)
        os.kill(process[1], signal.SIGKILL)
        assert processes.wait(process).code == -9
    assert len(out.read_bytes()) < len(whole)
    assert processes.run("generation_helpers.sample_after", "", *flags, out).code == 0
    assert out.read_bytes() == whole
    assert [line["id"] for line in read_lines(out)] == [f"p{n}" for n in range(60) for _ in range(2)]


ENDLESS = ("--prompt", "Ünd", "--max_new_tokens", "100000000", "--ignore_eot", "--stream", "on", "--seed", "1")


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_fault_093_ctrl_c_keeps_the_text_so_far_and_exits_130(start):
    process = start(*ENDLESS)
    first = process.stdout.read(30)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert first.startswith("Ünd".encode())
    assert rest.endswith(b"\n")
    assert (process.returncode, err) == (130, b"stopped: interrupted\n")


@pytest.mark.skipif(os.name == "nt", reason="POSIX pipes")
def test_fault_093_a_closed_pipe_ends_the_program_quietly(start):
    process = start(*ENDLESS)
    assert process.stdout.read(10)
    process.stdout.close()
    killer = threading.Timer(60, process.kill)
    killer.start()
    err = process.stderr.read()
    assert (process.wait(), err) == (0, b"")
    killer.cancel()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("flags", [("--stream", "on"), ("--stream", "off"), ("--prompts", __file__)])
def test_a_stdout_without_space_ends_in_exit_5_without_traceback(start, flags):
    prompt = () if "--prompts" in flags else ("--prompt", "abc")
    with open("/dev/full", "wb") as full:
        process = start(*prompt, *flags, "--max_new_tokens", "3", "--truncate", "--seed", "1", stdout=full)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 5
    lines = [line for line in err.decode().splitlines() if "lines are empty" not in line]
    assert lines == ["error: stdout: No space left on device; free space or redirect it elsewhere"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_fault_123_a_stderr_without_space_or_closed_changes_nothing(start):
    flags = ("--prompt", "abc", "--max_new_tokens", "0")
    with open("/dev/full", "wb") as full:
        lost = start(*flags, stderr=full)
    closed = start(*flags, before="sys.stderr.close(); sys.stderr = None")
    for process in (lost, closed):
        assert (process.communicate(timeout=60)[0], process.returncode) == (b"abc\n", 0)


AUTO = """
from gpt.kernels import build
build.load_library, build.start_background_build = lambda purpose: None, lambda purpose: True
small = load()
small.backend = "auto"
sample.TextGenerator.load = lambda *_: small
"""


NOTING = """
from gpt.errors import note
from gpt.generate import generator

class Noting(generator.Backend):
    def __init__(self, model):
        note("info", "no compiler")  # as Captured says it where Triton cannot compile
        super().__init__(model)

generator.BACKENDS["eager"] = Noting
"""


@pytest.mark.parametrize("stream", ["on", "off"])
@pytest.mark.parametrize("before", [AUTO, NOTING])
def test_notes_stand_in_lines_of_their_own_before_the_prompt(start, stream, before):
    if before == AUTO and os.name == "nt":
        pytest.skip("no native kernels on Windows")
    flags = ("--prompt", "class", "--max_new_tokens", "3", "--stream", stream)
    lines = start(*flags, before=before, stderr=subprocess.STDOUT).communicate(timeout=60)[0].split(b"\n")
    assert [line[:5] for line in lines[:3]] == [b"seed:", b"info:", b"class"]


def test_a_back_end_that_cannot_run_is_refused_before_anything_is_printed(cli, generator, monkeypatch):
    monkeypatch.setattr(generator, "backend", "captured")
    code, out, err = cli("--prompt", "class", "--seed", "1")
    assert (code, out) == (2, "")
    assert err.startswith("error: backend captured: ")


def test_fault_100_output_is_utf_8_in_the_c_locale_and_wandb_is_not_imported():
    before = "import atexit; atexit.register(lambda: print(*sorted(set(sys.modules) & {'wandb', 'transformers'})))"
    environment = {**os.environ, "LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    process = start_fresh(
        "--prompt", "Ünd 日本", "--max_new_tokens", "0", "--seed", "1", before=before, env=environment
    )
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out.decode(), err) == (0, "Ünd 日本\n\n", b"")
