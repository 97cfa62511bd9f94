"""The command: the table, the picture; and the picture that is drawn while a run trains."""

import errno
import json
import os
import re
import subprocess
import sys

import pytest
from paths import ROOT
from report_helpers import FAST, SLOW, make_run
from training_helpers import DRAW, in_process, make_data, text_of, train_here

from gpt.config import fields
from gpt.report import plot
from gpt.report.metrics import BITS, NATS, comparable, read_histories
from gpt.report.plot import PlotConfig, RunPicture, table
from gpt.text.tokenizer import train_bpe
from gpt.train import log


@pytest.fixture
def two(tmp_path):
    """The runs of FAST and SLOW."""
    fast = make_run(tmp_path / "fast", FAST, out="out/fast", lr=1e-3, schedule="wsd", max_steps=60, optimizer="muon")
    slow = make_run(tmp_path / "slow", SLOW, out="out/slow", lr=6e-4, schedule="wsd", max_steps=20)
    return fast, slow


def plot_here(*args):
    return in_process(plot.main, "plot", *args)


# ---- the table


def test_the_table_has_the_numbers_counted_by_hand(two):
    lines = table(read_histories(two), 3.4)
    assert lines[1].split() == ["fast", "60", "6,000", "1,060.0", "3.3000", "3.2000", "40"]
    assert lines[2].split() == ["slow", "20", "4,000", "61.5", "3.4000", "3.4000", "20"]
    assert re.split("  +", lines[4]) == ["to val_loss 3.4000", "seconds", "tokens"]
    assert [line.split() for line in lines[5:7]] == [["fast", "41.5", "4,000"], ["slow", "61.5", "4,000"]]
    assert max(map(len, lines)) < 80


def test_the_loss_to_reach_is_the_worst_of_the_best_ones_unless_given(two):
    assert "\nto val_loss 3.4000  " in plot_here(*two, "--out", two[0] / "x.png").stdout
    heading, fast, slow = plot_here(*two, "--loss", 3.3, "--out", two[0] / "x.png").stdout.splitlines()[4:7]
    assert heading.startswith("to val_loss 3.3000  ")
    assert fast.split()[-2:] == ["41.5", "4,000"]
    assert slow.split()[-2:] == ["-", "-"]
    assert plot_here(two[0], "--loss", 5).stdout.splitlines()[4].split()[-2:] == ["0.0", "0"]


def test_the_settings_that_differ_are_told_and_no_others(two):
    rows = [line.split() for line in table(read_histories(two), 3.4)[8:]]
    assert rows == [
        ["setting", "fast", "slow"],
        ["lr", "0.001", "0.0006"],
        ["max_steps", "60", "20"],
        ["optimizer", '"muon"', "-"],
    ]


def test_runs_with_the_same_settings_say_so(two):
    (two[1] / "config.toml").write_bytes((two[0] / "config.toml").read_bytes())
    assert table(read_histories(two), 3.4)[-1] == "no setting differs"


def test_a_run_without_validation_has_dashes(tmp_path):
    only_trained = make_run(tmp_path / "run", [{"step": 5, "tokens": 50, "loss": 2.0, "train_seconds": 1.0}])
    assert table(read_histories([only_trained]), None)[1].split() == ["run", "5", "50", "1.0", "-", "-", "-"]


# ---- different tokenizers


def in_units(records, bits_per_nat):
    return [r | ({"val_bpb": bits_per_nat * r["val_loss"]} if "val_loss" in r else {}) for r in records]


def with_tokenizer(run, identity):
    (run / "step-000000010/training").mkdir(parents=True)
    entry = {"tokenizer": {"name": "x", "identity": identity}}
    (run / "step-000000010/training/manifest.json").write_text(json.dumps(entry))
    return run


@pytest.fixture
def bytes_and_words(tmp_path):
    """Two runs: the first with the lower loss per token, the second with fewer bits per byte."""
    letters = make_run(tmp_path / "letters", in_units(FAST, 1.5))
    return with_tokenizer(letters, "a"), with_tokenizer(make_run(tmp_path / "words", in_units(SLOW, 0.4)), "b")


def test_runs_of_different_tokenizers_are_compared_by_bits_per_byte(bytes_and_words, drawn):
    run = plot_here(*bytes_and_words, "--out", bytes_and_words[0] / "x.png")
    assert run.code == 0, run.stderr
    assert "info: these runs have different tokenizers: compared by bits per byte" in run.stderr
    heading, letters, words, _, *reached = run.stdout.splitlines()
    assert re.split(r"  +", heading)[4:] == ["val_bpb", "best", "at step"]
    assert letters.split()[4:] == ["4.9500", "4.8000", "40"]
    assert words.split()[4:] == ["1.3600", "1.3600", "20"]
    assert reached[0].startswith("to val_bpb 4.8000  ")
    assert [line.split()[1:] for line in reached[1:3]] == [["41.5", "4,000"], ["0.0", "0"]]
    assert drawn[0].axes[0].get_ylabel() == "loss, bits per byte"
    lines = lines_of(drawn[0])  # of validation alone, and the loss to reach
    assert [len(line) for line in lines] == [4, 3, 2]
    assert lines[1] == [(tokens, pytest.approx(0.4 * loss)) for tokens, loss in ((0, 5.1), (2000, 4.1), (4000, 3.4))]


def test_a_loss_that_is_given_is_in_the_unit_of_the_table(bytes_and_words):
    heading, _, words = plot_here(
        *bytes_and_words, "--loss", 1.5, "--out", bytes_and_words[0] / "x.png"
    ).stdout.splitlines()[4:7]
    assert heading.startswith("to val_bpb 1.5000  ")
    assert words.split()[-2:] == ["61.5", "4,000"]


@pytest.mark.parametrize(
    ("identities", "ratios", "by_bits"),
    [
        ("aa", (1.0, 2.0), False),  # the same tokenizer, another validation text
        ("ab", (1.0, 1.0), True),
        ("a-", (1.0, 1.0), False),  # a run without checkpoints is known by its ratio
        ("a-", (1.0, 1.2), True),
        ("--", (0.9, 0.9), False),
        ("--", (0.9, 0.8), True),
    ],
)
def test_tokenizers_are_told_apart_by_their_identity_or_by_the_ratio_of_the_units(
    tmp_path, identities, ratios, by_bits
):
    runs = []
    for name, identity, ratio in zip(("one", "two"), identities, ratios, strict=True):
        runs.append(make_run(tmp_path / name, in_units(FAST, ratio)))
        if identity != "-":
            with_tokenizer(runs[-1], identity)
    histories = comparable(read_histories(runs))
    assert {history.unit for history in histories} == {BITS if by_bits else NATS}


def test_the_tokenizers_of_real_runs_are_told_apart_and_one_run_stays_in_nats(tmp_path):
    runs = []
    for name, tokenizer in (("byte", "byte"), ("bpe", train_bpe([text_of(4000)], 280)), ("again", "byte")):
        data = make_data(tmp_path / f"data-{name}", tokenizer=tokenizer)
        runs.append(tmp_path / name)
        done = train_here("tiny", "--data", data, "--out", runs[-1], "--max_steps", 2, "--warmup_steps", 0)
        assert done.code == 0, done.stderr
    units = [comparable(read_histories(chosen))[0].unit for chosen in (runs, runs[:2], runs[::2], runs[:1])]
    assert units == [BITS, BITS, NATS, NATS]


# ---- the picture


@pytest.fixture
def drawn(monkeypatch):
    """The matplotlib figures that are saved meanwhile."""
    figure = pytest.importorskip("matplotlib.figure", reason="needs matplotlib, the extra [plot]").Figure
    saved, save = [], figure.savefig

    def savefig(self, *args, **options):
        saved.append(self)
        save(self, *args, **options)

    monkeypatch.setattr(figure, "savefig", savefig)
    return saved


def lines_of(figure):
    """The points of each line that is drawn: [(place, loss), ...]."""
    return [[tuple(map(float, point)) for point in line.get_xydata()] for line in figure.axes[0].get_lines()]


def check_png(path):
    image = pytest.importorskip("PIL.Image", reason="needs matplotlib, the extra [plot]").open(path)
    image.load()
    assert image.format == "PNG"
    assert min(image.size) > 400


@pytest.mark.parametrize(
    ("axis", "training", "validation"),
    [
        ("step", [10, 20, 30, 40, 60], [0, 20, 40, 60]),
        ("tokens", [1000, 2000, 3000, 4000, 6000], [0, 2000, 4000, 6000]),
        ("seconds", [10, 20, 30, 41.5, 1060], [0, 20, 41.5, 1060]),
    ],
)
def test_both_losses_are_drawn_against_what_was_asked(two, drawn, axis, training, validation):
    run = plot_here(two[0], "--x", axis)
    assert run.code == 0, run.stderr
    assert lines_of(drawn[0]) == [
        list(zip(training, [4.0, 3.5, 3.1, 3.0, 2.9], strict=True)),
        list(zip(validation, [5.0, 3.6, 3.2, 3.3], strict=True)),
    ]
    check_png(two[0] / "loss.png")
    assert run.last == f"info: drawn: {two[0] / 'loss.png'}"


def test_one_run_is_drawn_by_step_and_several_by_tokens_into_the_current_folder(two, drawn, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert plot_here("fast").code == plot_here("fast", "slow").code == 0
    assert [figure.axes[0].get_xlabel() for figure in drawn] == ["training steps", "training tokens"]
    assert len(lines_of(drawn[1])) == 5  # with that of the loss to reach
    check_png(tmp_path / "loss.png")
    assert sorted(os.listdir("fast")) == ["config.toml", "loss.png", "metrics.jsonl"]
    assert sorted(os.listdir("slow")) == ["config.toml", "metrics.jsonl"]


@pytest.mark.parametrize(("name", "begin"), [("x.png", b"\x89PNG"), ("x.SVG", b"<?xml"), ("x.pdf", b"%PDF")])
def test_the_ending_of_the_file_decides_its_format(two, drawn, tmp_path, name, begin):
    assert plot_here(*two, "--out", tmp_path / name).code == 0
    assert (tmp_path / name).read_bytes().startswith(begin)


@pytest.mark.parametrize("name", ["$x_1$", "$", "_hidden", "雨 naïve", "a\x1b[2Jb", "%s {} \\frac"])
def test_fault_110_any_name_can_be_drawn_and_none_drives_the_terminal(tmp_path, drawn, name, recwarn):
    run = plot_here(make_run(tmp_path / name, FAST), make_run(tmp_path / "other", SLOW), "--out", tmp_path / "x.png")
    assert run.code == 0, run.stderr
    assert "\x1b" not in run.stdout + run.stderr
    assert [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()][1:] == ["other", "3.4000"]
    assert not recwarn.list


@pytest.mark.parametrize(
    "records", [FAST[:1], FAST[1:2], [r for r in FAST if "loss" in r], [r for r in FAST if "val_loss" in r]]
)
def test_runs_with_little_in_them_are_drawn(tmp_path, drawn, records):
    run = plot_here(make_run(tmp_path / "run", records))
    assert run.code == 0, run.stderr
    check_png(tmp_path / "run/loss.png")


def test_a_run_without_numbers_is_refused_alone_and_warned_of_among_others(tmp_path, drawn):
    empty, full = make_run(tmp_path / "empty", b""), make_run(tmp_path / "full", FAST)
    alone = plot_here(empty)
    assert (alone.code, alone.stdout) == (2, "")
    assert re.fullmatch(r"error: no losses by step yet: empty; .*", alone.last)
    both = plot_here(empty, full, "--out", tmp_path / "x.png")
    assert both.code == 0
    assert "warning: empty: no losses by tokens yet" in both.stderr
    assert both.stdout.splitlines()[1].split() == ["empty", *["-"] * 6]


def test_a_long_run_is_drawn_behind_its_running_mean_and_from_below_its_first_fall(tmp_path, drawn):
    records = [{"step": n, "loss": 10.0 if n < 4 else 3.0 + n % 2, "tokens": n} for n in range(120)]
    assert plot_here(make_run(tmp_path / "run", records)).code == 0
    _, mean = lines_of(drawn[0])  # over three neighbours, at the middle one
    assert mean[0] == (1, pytest.approx((10.0 * 3) / 3))
    assert mean[50] == (51, pytest.approx(sum(3.0 + n % 2 for n in (50, 51, 52)) / 3))
    assert 4.0 < drawn[0].axes[0].get_ylim()[1] < 4.2


def test_fault_041_a_picture_that_cannot_be_written_leaves_the_one_before(two, drawn, monkeypatch):
    assert plot_here(two[0]).code == 0
    before = (two[0] / "loss.png").read_bytes()
    (two[0] / "metrics.jsonl").write_text(json.dumps(FAST[1]) + "\n")

    def full_disk(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    run = plot_here(two[0])
    assert run.code == 5
    assert re.fullmatch(r"error: .*loss\.png: No space left on device; .*", run.last)
    assert (two[0] / "loss.png").read_bytes() == before
    assert sorted(os.listdir(two[0])) == ["config.toml", "loss.png", "metrics.jsonl"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no run is given"),
        (["nowhere"], r"nowhere: no metrics\.jsonl there; give the folder of a run"),
        (["."], r"\.: no metrics\.jsonl there"),
        (["fast", "--out", "x.gif"], r"'x\.gif' must end in \.png, \.svg, \.pdf"),
        (["fast", "--out", "no/x.png"], r"no/x\.png: must be a file in an existing folder"),
        (["fast", "--out", "folder.png"], r"folder\.png: must be a file"),
        (["fast", "--loss", "nan"], "--loss: must be a finite float"),
        (["fast", "--loss", "-1"], "must be 0 or more"),
        (["fast", "--y", "3"], "unknown option --y"),
        (["x" * 10_000], "give the folder of a run"),
    ],
)
def test_what_cannot_be_drawn_is_exit_2(two, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    run = plot_here(*words)
    assert run.code == 2
    assert run.last.startswith("error: ")
    assert re.search(message, run.last)
    assert not (tmp_path / "loss.png").exists()
    assert not (two[0] / "loss.png").exists()


# ---- matplotlib is an extra


def test_without_matplotlib_there_is_the_table_and_an_error_that_names_the_pip_line(two, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run = plot_here(two[0])
    assert run.code == 2
    assert run.stdout.splitlines()[1].startswith("fast ")
    assert re.fullmatch(
        r'error: no picture: .*matplotlib.*; pip install -c constraints\.txt -e "\.\[plot\]" .*', run.last
    )
    assert not (two[0] / "loss.png").exists()


def test_without_matplotlib_training_says_so_and_goes_on(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(RunPicture, "__call__", DRAW)
    run = train_here("tiny", "--data", data, "--out", tmp_path / "out", *SHORT, "--max_steps", 6)
    assert run.code == 0, run.stderr
    assert run.stderr.count("[plot]") == 1
    assert re.search(r"^info: no loss\.png .*\[plot\]", run.stderr, re.MULTILINE)
    assert "warning" not in run.stderr
    assert not (tmp_path / "out/loss.png").exists()


def test_the_command_starts_without_torch_and_the_import_without_matplotlib():
    code = "import sys, gpt.plot; print(*{name.split('.')[0] for name in sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "argparse" in run.stdout.split()
    assert not set(run.stdout.split()) & {"torch", "matplotlib", "wandb", "transformers"}


@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell")
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-", "| true"])
def test_fault_123_the_picture_is_drawn_whoever_reads_the_table(tmp_path, closed):
    pytest.importorskip("matplotlib")
    run = make_run(tmp_path / "é 雨", FAST)
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    shell = ["bash", "-c", f'set -o pipefail; "$0" -m gpt.plot "$@" {closed}', sys.executable, str(run)]
    done = subprocess.run(shell, cwd=ROOT, capture_output=True, timeout=60, env=environment)
    assert done.returncode == 0 and b"Traceback" not in done.stderr and b"rror" not in done.stderr
    check_png(run / "loss.png")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_fault_123_a_full_stdout_is_exit_5_and_no_picture(tmp_path):
    run = make_run(tmp_path / "run", FAST)
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "gpt.plot", str(run)]
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr.split(";")[0]) == (5, "error: stdout: No space left on device")
    assert not (run / "loss.png").exists()


def test_the_reference_and_help_name_every_flag():
    section = (ROOT / "docs/cli.md").read_text(encoding="utf-8").split("\n## python -m gpt.plot")[1].split("\n## ")[0]
    flags = fields(PlotConfig).keys() - {"runs"}
    assert set(re.findall(r"`--(\w+)", section)) == flags
    run = plot_here("--help")
    assert run.code == 0
    assert all(f"--{flag}" in run.stdout for flag in flags)


# ---- while a run trains

SHORT = ("--warmup_steps", 0, "--log_every", 1, "--eval_every", 3)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("plot") / "data")


@pytest.fixture
def drawing(monkeypatch):
    """Runs are drawn, as they are not in other tests."""
    pytest.importorskip("matplotlib", reason="needs matplotlib, the extra [plot]")
    monkeypatch.setattr(RunPicture, "__call__", DRAW)


def test_a_run_leaves_its_picture_and_a_resumed_one_a_new_one(data, tmp_path, drawing, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.chdir(tmp_path)  # where there is no `gpt`
    for steps in (3, 6):
        run = train_here("tiny", "--data", data, "--out", "out", *SHORT, "--max_steps", steps)
        assert run.code == 0, run.stderr
        assert "loss.png" not in run.stderr
        check_png(out / "loss.png")
        (out / "loss.png").rename(tmp_path / f"{steps}.png")
    assert plot_here(out).code == 0
    assert (out / "loss.png").read_bytes() == (tmp_path / "6.png").read_bytes() != (tmp_path / "3.png").read_bytes()
    assert not list(out.glob("*.tmp"))


def test_a_run_that_ends_before_an_evaluation_is_drawn_too(tmp_path, drawing):
    data = make_data(tmp_path / "data", val_size=0)
    assert train_here("tiny", "--data", data, "--out", tmp_path / "out", *SHORT, "--max_steps", 6).code == 0
    check_png(tmp_path / "out/loss.png")


def test_a_picture_that_cannot_be_drawn_is_one_warning(data, tmp_path, drawing, monkeypatch):
    (tmp_path / "out/loss.png").mkdir(parents=True)
    monkeypatch.setattr(log, "SECONDS_BETWEEN_DRAWINGS", 0)
    run = train_here("tiny", "--data", data, "--out", tmp_path / "out", *SHORT, "--max_steps", 6)
    assert run.code == 0, run.stderr
    assert run.stderr.count("warning:") == 1
    assert re.search(r"^warning: loss\.png was not drawn: Is a directory", run.stderr, re.MULTILINE)


def test_fault_117_the_picture_is_nobodys_to_change_and_no_link_is_written_through(two, drawn, tmp_path):
    (tmp_path / "mine").write_text("precious")
    (two[0] / "loss.png").symlink_to(tmp_path / "mine")
    assert plot_here(two[0]).code == 0
    assert (tmp_path / "mine").read_text() == "precious"
    check_png(two[0] / "loss.png")
    assert (two[0] / "loss.png").stat().st_mode & 0o022 == 0


@pytest.mark.parametrize("error", [AttributeError("np.Inf was removed"), MemoryError(), OSError(28, "No space left")])
def test_whatever_the_library_raises_a_run_in_training_warns_once_and_goes_on(two, drawing, monkeypatch, capsys, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(plot, "draw", fail)
    picture = RunPicture(two[0])
    for _ in range(2):
        picture()
    assert capsys.readouterr().err.count("warning: loss.png was not drawn") == 1


def test_help_shows_how_the_program_was_started(tmp_path):
    for words, name in ((["-m", "gpt.plot"], "python -m gpt.plot"), (["-m", "gpt", "plot"], "gpt plot")):
        run = subprocess.run([sys.executable, *words, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
        assert run.stdout.startswith(f"usage: {name} [")
