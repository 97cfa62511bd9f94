"""The interactive mode: what is typed, what is answered, and what a key press ends."""

import contextlib
import functools
import io
import os
import re
import select
import signal
import stat
import sys
import time

import pytest
from generation_helpers import replace_decode, scripted_decode, small_generator

from gpt.errors import InputError
from gpt.generate.interactive import every_key, interact
from gpt.model import ModelConfig

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = {"max_new_tokens": 8, "seed": 1, "ignore_eot": True}


@pytest.fixture
def generator():
    return small_generator(ModelConfig(2, 2, 32, 64))


@pytest.fixture
def type_in(generator, monkeypatch, capsys):
    """run(text, first=None, **settings) -> (what was written, what was told): the text is piped in."""

    def run(text, first=None, **settings):
        data = text if isinstance(text, bytes) else text.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        file = io.StringIO()
        interact(generator, SETTINGS | settings, 1, file.write, first)
        captured = capsys.readouterr()
        assert captured.out == ""
        return file.getvalue(), captured.err

    return run


def answer(generator, text, turn, **settings):
    [[completion]] = generator.generate([text], prompt_ids=[turn], truncate=True, **SETTINGS | settings)
    return completion.text


# ---- the text grows


def test_what_is_typed_is_added_to_the_text_so_far_and_an_empty_line_goes_on_with_it(type_in, generator):
    first = answer(generator, "To be", 1)
    second = answer(generator, "To be" + first, 2)
    third = answer(generator, f"To be{first}{second}\nör not", 3)
    assert not (first + second).endswith("\n")
    written, told = type_in("To be\n\nör not")
    assert written == f"{first}\n{second}\n{third}\n"
    assert told == ""


def test_a_text_that_ends_in_a_line_break_gets_no_second_one(type_in, generator, monkeypatch):
    asked, encode = [], generator.encode
    monkeypatch.setattr(generator, "encode", lambda text, *rest: asked.append(text) or encode(text, *rest))
    replace_decode(monkeypatch, scripted_decode(b"x\ny"))
    written, _ = type_in("a\nb\n\n", stop="never", ignore_eot=False)
    assert written == "x\ny\n\n\n"
    assert asked == ["a", "ax\ny\nb", "ax\ny\nb"]
    replace_decode(monkeypatch, scripted_decode(b"x\n"))
    type_in("a\nb\n", ignore_eot=False)
    assert asked[3:] == ["a", "ax\nb"]


def test_the_first_prompt_counts_as_typed_and_is_no_command(type_in, generator):
    first = answer(generator, "/set x", 1)
    assert type_in("\n", first="/set x")[0] == f"{first}\n{answer(generator, '/set x' + first, 2)}\n"


def test_the_text_is_cut_to_the_context_without_a_word(type_in, generator):
    long = "0123456789" * 20  # the context is 64
    first = answer(generator, long, 1)
    assert type_in(f"{long}\n\n") == (f"{first}\n{answer(generator, long + first, 2)}\n", "")


# ---- commands


def test_settings_change_what_follows(type_in, generator):
    lines = [
        "abc",
        "/set temperature 0",
        "/set --max-new-tokens 3",
        "/set ignore_eot off",
        "/set repetition_penalty 2",
        "",
    ]
    first = answer(generator, "abc", 1)
    changed = {"temperature": 0.0, "max_new_tokens": 3, "ignore_eot": False, "repetition_penalty": 2.0}
    written, told = type_in("\n".join(lines) + "\n")
    assert written == f"{first}\n{answer(generator, 'abc' + first, 2, **changed)}\n"
    assert told.splitlines() == [
        "temperature = 0.0",
        "max_new_tokens = 3",
        "ignore_eot = false",
        "repetition_penalty = 2.0",
    ]


@pytest.mark.parametrize(
    "typed, shown",
    [
        (r'"\n\n"', r'["\n\n"]'),
        ('["a", "b c"]', '["a", "b c"]'),
        ("END of it", '["END of it"]'),
        (r"\n\n", r'["\n\n"]'),
        ("5", '["5"]'),
        ("on", '["on"]'),
        ("[]", "[]"),
    ],
)
def test_stop_strings_can_be_set_as_text_or_as_json(type_in, typed, shown):
    assert type_in(f"/set stop {typed}\n") == ("", f"stop = {shown}\n")


def test_set_alone_lists_every_setting_with_its_value(type_in):
    told = type_in("/set top_k 7\n/set\n")[1]
    listed = dict(line.split(" = ") for line in re.sub(" +=", " =", told).splitlines()[1:])
    assert listed == {
        "max_new_tokens": "8",
        "temperature": "0.8",
        "top_k": "7",
        "top_p": "0.95",
        "min_p": "0.0",
        "repetition_penalty": "1.0",
        "frequency_penalty": "0.0",
        "presence_penalty": "0.0",
        "no_repeat_ngram": "0",
        "stop": "[]",
        "seed": "1",
        "ignore_eot": "true",
        "rows": "0",
        "allow_special": "false",
    }


@pytest.mark.parametrize(
    "line, message",
    [
        ("/set temprature 1", "/set: unknown setting temprature; perhaps you meant temperature"),
        ("/set do_sample 0", "/set: unknown setting do_sample; here it is temperature (0 is greedy)"),
        ("/set zzz 0", "/set: unknown setting zzz; /set alone lists every setting"),
        ("/set temperature", '/set: temperature "": must be float, not str'),
        ("/set temperature hot", '/set: temperature "hot": must be float, not str'),
        ("/set temperature nan", "/set: temperature"),
        ("/set top_p 7", "/set: top_p 7.0 must be above 0"),
        ("/set top_k 1.5", "/set: top_k 1.5: must be int, not float"),
        ("/set top_k " + "9" * 5000, "/set: top_k"),
        ("/set seed -1", "/set: seed -1 must be from 0"),
        ("/set seed null", "/set: seed null: must be int"),
        ("/set stop [", None),
        ('/set stop ""', "/set: stop must be strings that are not empty"),
        ("/set ignore_eot maybe", '/set: ignore_eot "maybe": must be bool, not str'),
        ("/set num_samples 2", "/set: unknown setting num_samples; "),
        ("/set truncate off", "/set: unknown setting truncate; /set alone lists every setting"),
        ("/reste", "/reste: no such command; /help lists them"),
        ("/", "/: no such command"),
        ("/reset all", "/reset all: no such command"),
    ],
)
def test_a_wrong_command_says_what_is_wrong_and_the_session_goes_on(type_in, generator, line, message):
    written, told = type_in(f"{line}\nabc\n")
    if message is None:
        assert told == 'stop = ["["]\n'
    else:
        assert told.startswith(f"error: {message}")
    assert told.count("\n") == 1
    assert written == answer(generator, "abc", 1) + "\n"


def test_reset_begins_a_new_text_with_the_same_settings_and_a_given_seed_repeats_it(type_in, generator):
    first = answer(generator, "abc", 1, max_new_tokens=3)
    written, told = type_in("/set max_new_tokens 3\nabc\nmore\n/reset\nabc\n")
    assert written.startswith(first + "\n")
    assert written.endswith(f"\n{first}\n")
    assert told == "max_new_tokens = 3\na new text begins\n"


def test_without_a_given_seed_a_new_text_is_another_and_set_seed_none_goes_back_to_that(generator, monkeypatch, capsys):
    def texts(lines, settings):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode())))
        file = io.StringIO()
        interact(generator, {"max_new_tokens": 30, "stop": "\n", "ignore_eot": True} | settings, 5, file.write)
        return file.getvalue().split("\n")

    first, second, *_ = texts(["abc", "/reset", "abc"], {})
    assert first != second
    assert texts(["abc", "/reset", "/set seed 5", "abc"], {})[:2] == [first, first]
    given = texts(["abc"], {"seed": 9})[0]
    assert texts(["/set seed none", "abc"], {"seed": 9})[0] not in (first, given)


def test_help_names_every_command_and_quit_leaves(type_in):
    written, told = type_in("/help\n/quit\nabc\n")
    assert written == ""
    assert all(command in told for command in ("/set", "/reset", "/help", "/quit", "Ctrl-C", "Ctrl-D"))


# ---- errors of one text


def test_a_line_that_is_not_utf_8_is_an_error_and_the_next_one_is_read(type_in, generator):
    written, told = type_in(b"a\xffb\nabc\n")
    assert told == "error: line: invalid UTF-8 at byte 1 (0xff); convert it to UTF-8\n"
    assert written == answer(generator, "abc", 1) + "\n"


def test_fault_087_logits_that_are_not_finite_end_one_text_which_is_then_as_before(type_in, generator, monkeypatch):
    decode, calls, asked, encode = scripted_decode(b"okxyzw"), [], [], generator.encode

    def broken(ids, cache):
        calls.append(1)
        return decode(ids, cache) * (float("nan") if len(calls) == 4 else 1)

    replace_decode(monkeypatch, broken)
    monkeypatch.setattr(generator, "encode", lambda text, *rest: asked.append(text) or encode(text, *rest))
    written, told = type_in("a\nb\nc\n", ignore_eot=False, max_new_tokens=2)
    assert asked == ["a", "aok\nb", "aok\nc"]
    assert told.startswith("error: non-finite logits at token 2: ")
    assert written == "ok\nx\nzw\n"


def test_a_stdin_that_cannot_be_read_is_refused(generator, monkeypatch, tmp_path):
    with open(os.open(tmp_path / "x", os.O_WRONLY | os.O_CREAT), encoding="utf-8") as only_for_writing:
        monkeypatch.setattr(sys, "stdin", only_for_writing)
        with pytest.raises(InputError, match=r"^stdin: Bad file descriptor; type into a terminal, or pipe the lines"):
            interact(generator, SETTINGS, 1, print)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_stdout_without_space_ends_the_session_in_exit_5(start):
    with open("/dev/full", "wb") as full:
        process = start("--interactive", "--seed", "1", stdin=-1, stdout=full)
    _, err = process.communicate(b"abc\nabc\n", timeout=60)
    assert process.returncode == 5
    assert err.decode() == "error: stdout: No space left on device; free space or redirect it elsewhere\n"


# ---- key presses

WRITES_A = """
from gpt.generate.backend import Backend
def slowly(*_):
    generator = load()
    def decode(ids, cache):
        cache.lengths += 1
        time.sleep(0.002)
        logits = torch.zeros(len(ids), 257)
        logits[:, 97] = 50.0
        return logits
    Backend.decode = staticmethod(decode)
    return generator
sample.TextGenerator.load = slowly
"""
# Seconds from a prompt to a key. Python shows its prompt a moment before it listens for signals; no person is so fast.
READY = 0.3
ENDLESS = ("--interactive", "--max_new_tokens", "100000000", "--seed", "1")


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_fault_093_an_interrupt_ends_the_text_under_way_and_the_text_so_far_stays(start):
    process = start(*ENDLESS, before=WRITES_A, stdin=-1)
    process.stdin.write(b"abc\n")
    process.stdin.flush()
    first = process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    process.stdin.write(b"/set max_new_tokens 3\n\n/set\n")
    rest, err = process.communicate(timeout=60)
    assert (first, process.returncode) == (b"a" * 20, 0)
    assert re.fullmatch(rb"a*\naaa\n", rest)
    assert b"max_new_tokens     = 3\n" in err


@pytest.fixture
def terminal(start, tmp_path):
    """terminal(*flags) -> a context with (process, see, press): see `on_terminal`."""
    return functools.partial(on_terminal, start, tmp_path)


@contextlib.contextmanager
def on_terminal(start, tmp_path, *flags):
    """A process on a pseudo-terminal: see(text) waits for a text, returning what came before; press(bytes)."""
    pytest.importorskip("termios")
    master, slave = os.openpty()
    environment = {"TERM": "dumb", "XDG_STATE_HOME": str(tmp_path / "state")}
    streams = {"stdin": slave, "stdout": slave, "stderr": slave, "terminal": True}
    process = start(*flags, before=WRITES_A, env=environment, **streams)
    os.close(slave)
    held = b""

    def see(text):
        nonlocal held
        end = time.monotonic() + 60
        while text not in held:
            assert select.select([master], [], [], max(0, end - time.monotonic()))[0], held
            data = os.read(master, 4096)
            assert data, held
            held += data
        before, _, held = held.partition(text)
        return before

    try:
        yield process, see, lambda data: os.write(master, data)
    finally:
        process.kill()
        process.wait(60)
        os.close(master)


@pytest.mark.skipif(not hasattr(os, "login_tty"), reason="needs pseudo-terminals")
def test_fault_093_on_a_terminal_ctrl_c_ends_one_text_then_one_line_and_ctrl_d_leaves(terminal):
    with terminal(*ENDLESS) as (process, see, press):
        see(b"> ")
        press(b"abc\n")
        see(b"a" * 30)
        press(b"\x03")
        see(b"> ")
        press(b"/set max_new_tokens 3\n")
        see(b"max_new_tokens = 3")
        see(b"> ")
        press(b"half a line")
        see(b"half a line")
        time.sleep(READY)
        press(b"\x03")
        see(b"Ctrl-C again or Ctrl-D leaves")
        see(b"> ")
        press(b"go on\n")
        assert see(b"> ").endswith(b"aaa\r\n")
        press(b"\x04")
        assert process.wait(60) == 0


@pytest.mark.skipif(not hasattr(os, "login_tty"), reason="needs pseudo-terminals")
@pytest.mark.parametrize("pasted", [b"one\ntwo\n", b"one\n\n\xc3\xa9\nfour\n", b"one\rtwo\r", b"one\n/set x\n"])
@pytest.mark.parametrize("end", [b"", b"unfinished"])
def test_lines_that_are_pasted_together_are_one_turn_and_those_typed_are_turns_of_their_own(terminal, pasted, end):
    with terminal("--interactive", "--max_new_tokens", "2", "--seed", "1") as (process, see, press):
        see(b"> ")
        press(pasted + end)
        if end:
            see(end)
            time.sleep(READY)
            press(b"\n")
        answer = see(b"aa\r\n")
        assert b"> " not in answer and b"error" not in answer
        assert b"aa" not in see(b"> ")
        for line in (b"one\n", b"two\n"):
            press(line)
            see(b"aa\r\n")
            see(b"> ")
        press(b"/set temperature 0\n/set top_k 3\n")  # commands stay lines
        see(b"temperature = 0")
        see(b"top_k = 3")
        press(b"\x04")
        assert process.wait(60) == 0


@pytest.mark.skipif(not hasattr(os, "login_tty"), reason="needs pseudo-terminals")
@pytest.mark.parametrize(
    "early, turns",
    [
        (b"\x04", 0),
        (b"typed\x04\r\x04", 1),  # the first Ctrl-D is not on an empty line
        (b"one\ntwo\n\x04", 1),  # a paste
        (b"/set top_k 3\n\x04", 0),
    ],
)
def test_keys_that_are_pressed_while_the_model_writes_count_at_the_next_prompt(terminal, early, turns):
    with terminal("--interactive", "--max_new_tokens", "300", "--seed", "1") as (process, see, press):
        see(b"> ")
        press(b"abc\n")
        see(b"a" * 30)
        press(early)
        for _ in range(1 + turns):
            see(b"aa\r\n")
        assert process.wait(60) == 0
        with pytest.raises((OSError, AssertionError)):
            see(b"aa\r\n")  # the end, and no further text


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs pseudo-terminals")
def test_the_terminal_is_as_before_after_the_session_and_shows_keys_during_it(monkeypatch):
    termios = pytest.importorskip("termios")
    pytest.importorskip("readline")
    master, slave = os.openpty()
    with os.fdopen(master), os.fdopen(slave) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        before = termios.tcgetattr(slave)
        with pytest.raises(KeyError), every_key():
            assert termios.tcgetattr(slave)[3] == before[3] & ~termios.ICANON
            assert before[3] & termios.ECHO
            raise KeyError
        assert termios.tcgetattr(slave) == before


@pytest.mark.skipif(not hasattr(os, "login_tty"), reason="needs pseudo-terminals")
def test_ctrl_c_twice_leaves_and_the_lines_are_kept_for_the_owner_alone(terminal, tmp_path):
    pytest.importorskip("readline")
    history = tmp_path / "state/gpt-text-generator/history"
    for session in range(2):
        with terminal("--interactive", "--max_new_tokens", "2", "--seed", "1") as (process, see, press):
            see(b"> ")
            press(b"first line\n" if session == 0 else b"\x10\n")  # the second session fetches it with "up"
            see(b"aa\r\n")
            see(b"> ")
            time.sleep(READY)
            press(b"\x03")
            see(b"Ctrl-C again or Ctrl-D leaves\r\n> ")
            time.sleep(READY)
            press(b"\x03")
            assert process.wait(60) == 0
        assert "first line" in history.read_text()
        assert stat.S_IMODE(history.stat().st_mode) == 0o600
        history.chmod(0o644)


@pytest.mark.skipif(not hasattr(os, "login_tty"), reason="needs pseudo-terminals")
def test_a_history_that_cannot_be_written_is_no_error(terminal, tmp_path):
    (tmp_path / "state").write_text("a file where a folder should be")
    with terminal("--interactive", "--max_new_tokens", "2", "--seed", "1") as (process, see, press):
        see(b"> ")
        press(b"abc\n")
        see(b"aa\r\n")
        see(b"> ")
        press(b"/quit\n")
        assert process.wait(60) == 0
        assert b"Traceback" not in see(b"/quit")
