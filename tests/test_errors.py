"""Exit codes and lines on stderr, with streams whose reader is present, gone, slow or a full disk."""

import errno
import os
import subprocess
import sys

import pytest
from paths import ROOT
from tqdm import tqdm

from gpt.errors import ignore_write_errors, note, printable, tell

START = "import sys; from gpt.errors import *\n"
BUFFERED = pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])  # PYTHONUNBUFFERED


@pytest.fixture
def nobody():
    """Returns the writing end of a pipe without a reader."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


def run(code, **streams):
    """Runs `code` as a script and returns its CompletedProcess. Captures the streams that are not given."""
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | streams
    return subprocess.run([sys.executable, "-c", START + code], cwd=ROOT, timeout=60, **given)


# ---- readers that have gone


TALK = "def main():\n    for n in range(3): note('warning', 'spoken')\n"


def test_fault_036_a_program_goes_on_when_nobody_reads_its_notes(nobody):
    done = run(TALK + "    print('done')\nrun_main(main)", stderr=nobody)
    assert (done.returncode, done.stdout) == (0, "done\n")


def test_fault_036_an_error_that_nobody_reads_keeps_its_code(nobody):
    for name, code in (("InputError", 2), ("ResourceError", 5), ("Stopped", 75)):
        done = run(TALK + f"    raise {name}('x: y; z')\nrun_main(main)", stdout=nobody, stderr=nobody)
        assert done.returncode == code


def test_fault_036_writes_by_other_functions_do_not_change_the_exit_code(nobody):
    code = TALK + "    print('x', file=sys.stderr)\n    sys.stderr.write('no end of line')\nrun_main(main)"
    assert run(code, stderr=nobody).returncode == 0


@pytest.mark.parametrize(("words", "code"), [("", 0), (", quiet_pipe=False", 1)])
def test_fault_093_a_reader_who_leaves_ends_a_program_that_writes_for_the_reader_and_no_other(nobody, words, code):
    script = f"def main():\n    for n in range(100_000): print(n)\nrun_main(main{words})"
    done = run(script, stdout=nobody)
    assert done.returncode == code
    assert ("Traceback" in done.stderr) == bool(code)


@BUFFERED
@pytest.mark.parametrize("words", ["", ", quiet_pipe=False"])
def test_fault_036_a_last_line_that_nobody_reads_is_no_failure(nobody, words, unbuffered):
    code = f"def main():\n    with ignore_write_errors(sys.stdout): print('nothing to do')\nrun_main(main{words})"
    done = run(code, stdout=nobody, env=os.environ | {"PYTHONUNBUFFERED": unbuffered})
    assert (done.returncode, done.stderr) == (0, "")


def test_fault_036_a_stderr_closed_before_the_start_does_not_send_notes_to_stdout():
    command = ["sh", "-c", 'exec "$0" -c "$1" 2>&-', sys.executable, START + TALK + "    print('done')\nrun_main(main)"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "done\n")


def test_a_program_goes_on_after_it_closed_stderr():
    done = run("def main():\n    sys.stderr.close()\n    tell('x')\n    print('done')\nrun_main(main)")
    assert (done.returncode, done.stdout) == (0, "done\n")


# ---- full disks


@pytest.fixture
def full():
    """Returns a file on a full disk."""
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    with open("/dev/full", "w", encoding="utf-8") as file:
        yield file


def test_fault_037_a_program_goes_on_when_its_notes_fill_the_disk(full):
    done = run(TALK + "    print('done')\nrun_main(main)", stderr=full)
    assert (done.returncode, done.stdout) == (0, "done\n")


@BUFFERED
def test_a_program_fails_when_a_full_disk_loses_its_text(full, unbuffered):
    code = "def main():\n    print('text')\nrun_main(main)"
    done = run(code, stdout=full, env=os.environ | {"PYTHONUNBUFFERED": unbuffered})
    assert done.returncode not in (0, 120)


LOST = "error: stdout: No space left on device; free space or redirect it elsewhere\n"


@BUFFERED
@pytest.mark.parametrize("line", ["say('text')", "say('text'); sys.exit()", "with stdout_errors(): print('text')"])
def test_fault_123_a_full_stdout_ends_in_exit_5_and_one_line(full, line, unbuffered):
    code = f"def main():\n    {line}\nrun_main(main)"
    done = run(code, stdout=full, env=os.environ | {"PYTHONUNBUFFERED": unbuffered})
    assert (done.returncode, done.stderr) == (5, LOST)


@pytest.mark.parametrize("end", ["", "; sys.exit()"])
def test_fault_123_what_others_print_is_lost_at_the_last_flush_with_the_same_line(full, end):
    code = f"def main():\n    print('text'){end}\nrun_main(main, quiet_pipe=False)"
    done = run(code, stdout=full, env=os.environ | {"PYTHONUNBUFFERED": ""})
    assert (done.returncode, done.stderr) == (5, LOST)


@pytest.mark.parametrize("end, code, last", [("Stopped('x')", 75, "stopped: x"), ("KeyError(7)", 1, "KeyError: 7")])
def test_fault_123_an_error_keeps_its_code_and_line_when_stdout_is_full(full, end, code, last):
    script = f"def main():\n    print('text')\n    raise {end}\nrun_main(main)"
    done = run(script, stdout=full, env=os.environ | {"PYTHONUNBUFFERED": ""})
    assert (done.returncode, done.stderr.splitlines()[-1]) == (code, last)


@pytest.mark.parametrize("program", ["train.py", "sample.py", "data/prepare.py", "gpt/plot.py"])
def test_fault_123_every_program_ends_in_exit_5_and_one_line_when_its_help_is_lost(processes, full, program):
    done = processes.open("training_helpers.run_script", program, "--help", stdout=full)
    _, stderr = done.communicate()
    assert (done.returncode, stderr.decode()) == (5, LOST)


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_fault_123_a_program_runs_with_streams_closed_before_the_start(closed):
    code = "def main():\n    say('text'); sys.stdout.isatty(); sys.stderr.isatty(); note('info', 'x')\nrun_main(main)"
    command = ["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, START + code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    stdout, stderr = "" if ">&-" in closed.split() else "text\n", "" if "2>&-" in closed else "info: x\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, stdout, stderr)


NARROW = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("narrow", [NARROW, {"PYTHONIOENCODING": "cp1252"}, {"PYTHONIOENCODING": "ascii"}])
def test_fault_123_text_that_a_stream_cannot_show_is_escaped(narrow):
    rain = "'\\xe9 \\u96e8'"  # the command line may hold ASCII alone
    code = f"def main():\n    say({rain}); note('info', {rain}); raise InputError({rain})\nrun_main(main)"
    done = run(code, env=os.environ | narrow, text=False)
    assert done.returncode == 2
    shown = "é" if narrow.get("PYTHONIOENCODING") == "cp1252" else "\\xe9"
    assert done.stdout.decode("cp1252").splitlines() == [f"{shown} \\u96e8"]
    assert done.stderr.decode("cp1252").splitlines() == [f"info: {shown} \\u96e8", f"error: {shown} \\u96e8"]


class Slow:
    """A stream that refuses one write, because its reader is slow."""

    closed, encoding = False, "utf-8"

    def __init__(self):
        self.written, self.refusals = [], 1

    def write(self, text):
        if self.refusals:
            self.refusals -= 1
            raise BlockingIOError(errno.EAGAIN, "try again")
        self.written.append(text)

    def flush(self):
        """Does nothing: write keeps no buffer."""


def test_a_slow_reader_misses_a_line_and_gets_the_next(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Slow())
    tell("first")
    tell("second")
    assert "".join(sys.stderr.written) == "second\n"


def test_errors_that_do_not_concern_the_stream_are_raised():
    with pytest.raises(ValueError, match="another"), ignore_write_errors(sys.stderr):
        raise ValueError("another")


# ---- lines


def test_fault_110_a_note_cannot_drive_the_terminal(capsys):
    note("warning", "a\x1b[2J\u202eb\rc")
    assert capsys.readouterr().err == "warning: a\\x1b[2J\\u202eb\\x0dc\n"


@pytest.mark.parametrize("character", "\u200e\u200f\u061c\u200c\u200d\ufe0f")
def test_fault_110_marks_of_the_direction_and_joiners_are_no_danger(character):
    assert printable(f"a{character}b") == f"a{character}b"


@pytest.mark.parametrize("character", "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029\x9b")
def test_fault_110_overrides_embeddings_and_isolates_are_escaped(character):
    assert printable(f"a{character}b") == f"a{ascii(character)[1:-1]}b"


@pytest.mark.parametrize("kind, error", [("error", "InputError"), ("error", "ResourceError"), ("stopped", "Stopped")])
def test_fault_131_a_line_break_in_a_name_forges_no_last_line(kind, error):
    done = run(f"def main(): raise {error}('out/a\\nerror: b: not found')\nrun_main(main)")
    assert done.stderr == f"{kind}: out/a\\x0aerror: b: not found\n"


def test_fault_131_a_line_break_in_a_name_forges_no_note(capsys):
    note("info", "continuing out/a\nerror: b: not found")
    assert capsys.readouterr().err == "info: continuing out/a\\x0aerror: b: not found\n"


def test_text_of_several_lines_keeps_them(capsys):
    tell("a\n\tb")
    assert capsys.readouterr().err == "a\n\tb\n"


def screen(text):
    """Returns the lines that a terminal shows after `text`; a carriage return goes back to the start of the line."""
    lines, column = [""], 0
    for character in text:
        if character == "\n":
            lines.append("")
        elif character != "\r":
            lines[-1] = lines[-1][:column] + character + lines[-1][column + 1 :]
        column = 0 if character in "\r\n" else column + 1
    return [line.rstrip() for line in lines]


def test_a_note_stands_in_a_line_of_its_own_above_the_progress_bar(capsys):
    with tqdm(total=10, file=sys.stderr, ncols=40) as bar:
        bar.update(3)
        note("info", "beside")
        shown = screen(capsys.readouterr().err)
    assert shown[-2] == "info: beside"
    assert "3/10" in shown[-1]
