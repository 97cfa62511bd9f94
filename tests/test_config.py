"""Settings: precedence, the values of a command line, each kind of mistake and its message, TOML, presets, help."""

import os
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from typing import Literal

import prepare
import pytest
from paths import ROOT
from training_helpers import in_process, run_train, train_here

import gpt
import sample
import train
from gpt.config import (
    explanations,
    fields,
    find_preset,
    flatten,
    list_presets,
    make_config,
    parse_flags,
    positional,
    read_toml,
    refuse,
    to_toml,
)
from gpt.errors import InputError
from gpt.generate import interactive
from gpt.report import plot
from gpt.train.start import read_settings

PRESETS = sorted(train.PRESETS.glob("*.toml"))


@dataclass(frozen=True)
class Inner:
    n_layer: int = 12
    """blocks"""
    lr: float = 1e-3
    """rate"""


@dataclass(frozen=True)
class Config:
    name: str = "x"
    """a name"""
    schedule: Literal["cosine", "linear"] = "cosine"
    """a shape that
    loses 10 % a step"""
    fast: bool = False
    """a switch"""
    stop: tuple[str, ...] = ()
    """some strings"""
    inner: Inner = field(default=Inner())

    def __post_init__(self):
        problems = [f"n_layer {self.inner.n_layer} must be above 0"] if self.inner.n_layer <= 0 else []
        if self.inner.lr <= 0:
            problems.append(f"lr {self.inner.lr} must be above 0")
        refuse(problems)


def preset(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


def message(*argv, **keywords):
    with pytest.raises(InputError) as caught:
        load(argv, **keywords)
    return str(caught.value)


def load(argv=(), base=None, preset=None):
    """Returns the Config of a base, a preset file and a command line, as the scripts make it."""
    from_preset = read_toml(preset, Config) if preset else {}
    return make_config(Config, base or {}, from_preset, parse_flags(Config, list(argv)))


# ---- precedence, and what is given


def test_flags_win_over_the_preset_that_over_the_base_that_over_the_defaults(tmp_path):
    toml = preset(tmp_path, "lr = 2.0\nn_layer = 2")
    base = {"lr": 3.0, "n_layer": 3, "name": "base"}
    assert flatten(load(["--n_layer", "1"], base, toml)) == {
        "name": "base",
        "schedule": "cosine",
        "fast": False,
        "stop": (),
        "n_layer": 1,
        "lr": 2.0,
    }


def test_a_flag_that_repeats_the_default_is_given():
    assert parse_flags(Config, ["--n_layer", "12", "--fast", "--stop"]) == {"n_layer": 12, "fast": True, "stop": ()}
    assert parse_flags(Config, []) == {}


def test_a_value_has_the_type_of_its_field():
    words = ["--lr", "1", "--no-fast", "--stop", "-a", "- b", "--schedule", "linear", "--name", "12"]
    values = {"lr": 1.0, "fast": False, "stop": ("-a", "- b"), "schedule": "linear", "name": "12"}
    assert parse_flags(Config, words) == values
    assert type(parse_flags(Config, ["--lr", "1"])["lr"]) is float


@pytest.mark.parametrize(("text", "seed"), [("7", 7), ("None", None)])
def test_a_number_that_may_be_none_is_read(text, seed):
    assert parse_flags(sample.SampleConfig, ["--seed", text]) == {"seed": seed}


def test_an_equals_sign_gives_a_value_that_looks_like_an_option():
    assert parse_flags(Config, ["--name=--lr=2"]) == {"name": "--lr=2"}


DASHES = ["--", "---", "--- x", "-- ", "--- chapter 1 ---", "--\n", "--1"]


@pytest.mark.parametrize("text", ["-x", "-", "-1e-3", "-h2", "- b", *DASHES])
def test_a_value_may_begin_with_a_dash(text):
    assert parse_flags(Config, ["--name", text]) == parse_flags(Config, [f"--name={text}"]) == {"name": text}


@pytest.mark.parametrize("text", DASHES)
def test_a_list_may_hold_words_of_dashes(text):
    assert parse_flags(Config, ["--stop", text]) == {"stop": (text,)}
    assert parse_flags(Config, ["--stop", text, "a", "--lr", "1"]) == {"stop": (text, "a"), "lr": 1.0}
    assert parse_flags(Config, ["--lr", "1", "--stop", "a", text]) == {"lr": 1.0, "stop": ("a", text)}


def test_two_dashes_between_values_and_words_end_the_options():
    assert parse_flags(Command, ["--stop", "a", "b", "--", "tiny"]) == {"stop": ("a", "b"), "preset": "tiny"}
    assert parse_flags(Command, ["--lr", "1", "--", "tiny"]) == {"lr": 1.0, "preset": "tiny"}
    assert parse_flags(Command, ["--", "--- x"]) == {"preset": "--- x"}


@pytest.mark.parametrize("words", [["--name", "--fast"], ["--name", "--lr=2"], ["--name", "--unknown"], ["--name"]])
def test_an_option_is_no_value(words):
    assert message(*words).startswith("settings: argument --name: expected one argument")


def test_a_second_word_of_dashes_is_refused_as_it_was_typed():
    assert message("--name", "a", "---") == "settings: '---' belongs to no option"
    assert "must be a finite float, not '---'" in message("--lr=---")


@pytest.mark.parametrize("number", ["-1", "-1e-3", "-.5", "-2E+3"])
def test_a_negative_number_is_refused_by_the_setting_itself(number):
    assert parse_flags(Config, ["--lr", number]) == {"lr": float(number)}
    assert message("--lr", number) == f"settings: lr {float(number)} must be above 0"


@dataclass(frozen=True)
class Command(Config):
    preset: str = positional("PRESET", default="")
    """a preset"""


@pytest.mark.parametrize(
    "words", [["tiny", "--lr", "1", "--fast"], ["--lr", "1", "tiny", "--fast"], ["--fast", "--lr=1", "tiny"]]
)
def test_a_positional_word_stands_anywhere(words):
    assert parse_flags(Command, words) == {"preset": "tiny", "lr": 1.0, "fast": True}


def test_positional_words_of_a_list_are_gathered():
    words = ["a", "--out", "x", "-", "--workers", "1", "b"]
    assert parse_flags(prepare.PrepareConfig, words) == {"inputs": ("a", "-", "b"), "out": "x", "workers": 1}


def test_two_dashes_end_the_options():
    words = ["--out", "x", "--", "--a", "--workers=1", "-h2"]
    assert parse_flags(prepare.PrepareConfig, words) == {"out": "x", "inputs": ("--a", "--workers=1", "-h2")}
    assert parse_flags(Command, ["tiny", "--"]) == {"preset": "tiny"}
    assert "--lr: expected one argument" in message("--lr", "--", "1")


def test_a_preset_may_follow_the_flags(tmp_path):
    words = ["--data", "x", "--lr", "0.5", "tiny", "--out", str(tmp_path)]
    assert settings_of(words) == settings_of(["tiny", *words[:4], *words[5:]])
    assert settings_of(words)[0].optim.lr == 0.5


def settings_of(words):
    return read_settings(train.CommandLine, train.TrainConfig, words, train.PRESETS, "")


@pytest.mark.parametrize("words", [["--n_layer", "4"], ["--n-layer", "4"], ["--n_layer=4"], ["--n-layer=4"]])
def test_dashes_underscores_and_equals_signs_mean_the_same(words):
    assert parse_flags(Config, words) == {"n_layer": 4}


def test_an_integer_in_toml_is_a_float_where_a_float_is_wanted(tmp_path):
    config = load(preset=preset(tmp_path, "lr = 1"))
    assert type(config.inner.lr) is float


def test_a_preset_completed_by_flags_is_checked_only_as_a_whole(tmp_path):
    config = load(["--n_layer", "1"], preset=preset(tmp_path, "n_layer = -1"))
    assert config.inner.n_layer == 1


# ---- mistakes


def test_fault_095_a_mistyped_flag_is_refused_with_a_suggestion():
    assert "unknown option --n_layers; perhaps you meant --n_layer" in message("--n_layers", "3")


def test_fault_095_a_mistyped_preset_key_is_refused_with_a_suggestion(tmp_path):
    said = message(preset=preset(tmp_path, "n_layers = 3"))
    assert "mine.toml: unknown setting n_layers; perhaps you meant n_layer" in said


def test_fault_095_train_names_the_option_meant():
    assert "--max_step; perhaps you meant --max_steps" in train_here("tiny", "--data", "x", "--max_step", "3").last
    assert "--learning_rate; here it is --lr" in train_here("tiny", "--data", "x", "--learning_rate", "3").last


@pytest.mark.parametrize("value", ["1e3", "8.5", "true", "", "nan", "9" * 5000])
def test_fault_096_what_is_no_int_is_refused_naming_option_value_and_type(value):
    for words in (["--n_layer", value], [f"--n_layer={value}"]):
        said = message(*words)
        assert f"--n_layer: invalid int value: {value!r}" in said


def test_fault_096_what_is_neither_int_nor_none_is_refused():
    with pytest.raises(InputError, match="--seed: invalid int_or_none value: 'x'"):
        parse_flags(sample.SampleConfig, ["--seed", "x"])


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999", "fast", ""])
def test_fault_096_what_is_no_finite_float_is_refused_naming_option_value_and_type(value):
    for words in (["--lr", value], [f"--lr={value}"]):
        said = message(*words)
        assert f"--lr: must be a finite float, not {value!r}" in said


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_fault_096_nan_and_inf_in_a_preset_are_refused(tmp_path, value):
    said = message(preset=preset(tmp_path, f"lr = {value}"))
    assert "mine.toml: lr = " in said
    assert "finite float" in said


def test_fault_096_every_float_setting_of_train_refuses_nan():
    names = [name for name, known in fields(train.TrainConfig).items() if known.type is float]
    assert len(names) > 8
    for name in names:
        with pytest.raises(InputError, match=f"--{name}: must be a finite float, not 'nan'"):
            parse_flags(train.TrainConfig, ["--data", "x", "--max_steps", "1", f"--{name}", "nan"])


@pytest.mark.parametrize(
    "twice", [["--lr", "1", "--lr", "1"], ["--n-layer", "1", "--n_layer=2"], ["--fast", "--no_fast"]]
)
def test_fault_096_an_option_given_twice_is_refused(twice):
    name = twice[0].removeprefix("--").replace("-", "_")
    assert f"option --{name} is given twice" in message(*twice)


def test_fault_096_the_last_line_of_stderr_is_the_error_and_the_code_is_2():
    flags = ["--global_batch_size", "1e3"], ["--schedule", "cosin"], ["--lr"], ["more"]
    for words in flags:
        run = train_here("tiny", "--data", "x", *words)
        assert run.code == 2
        assert run.last.startswith("error: ")
        assert words[0].lstrip("-") in run.last
        assert "Traceback" not in run.stderr


def test_a_value_outside_the_choices_is_refused_naming_them(tmp_path):
    for said in (message("--schedule", "step"), message(preset=preset(tmp_path, 'schedule = "step"'))):
        assert all(word in said for word in ("schedule", "step", "cosine", "linear"))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("n_layer = 1.0", "n_layer = 1.0: must be int, not float"),
        ("n_layer = true", "n_layer = True: must be int, not bool"),
        ('n_layer = "1"', "n_layer = '1': must be int, not str"),
        ("name = 1", "name = 1: must be str, not int"),
        ('fast = "yes"', "fast = 'yes': must be bool, not str"),
        ("schedule = ['cosine']", "must be one of cosine, linear"),
        ("[inner]\nn_layer = 2", "unknown setting inner"),
        ("n_layer: 2", "not valid TOML"),
        (f"n_layer = {'9' * 5000}", "not valid TOML"),
        ("stop = " + "[" * 100_000, "not valid TOML"),
        (f"lr = {10**400}", "too large to convert to float"),
        ("lr = 1e400", "must be a finite float"),
    ],
)
def test_a_preset_line_of_the_wrong_kind_is_refused(tmp_path, line, said):
    assert said in message(preset=preset(tmp_path, line))


@pytest.mark.parametrize("words", [["--lr"], ["--lr", "--fast"], ["--fast", "--lr"]])
def test_fault_096_an_option_without_a_value_is_refused(words):
    assert message(*words) == "settings: argument --lr: expected one argument; --help explains every setting"


def test_fault_096_a_switch_takes_no_value():
    assert "--fast: ignored explicit argument '1'" in message("--fast=1")
    assert "--no-fast: ignored explicit argument '1'" in message("--no-fast=1")
    assert "'1' belongs to no option" in message("--fast", "1")


@pytest.mark.parametrize("words", [["word"], ["--lr", "1", "word"], ["--lr=1", "word"], ["--no-fast", "word"]])
def test_a_word_that_belongs_to_no_option_is_refused(words):
    assert "'word' belongs to no option" in message(*words)


def test_a_second_positional_word_is_refused():
    with pytest.raises(InputError, match="'more' belongs to no option"):
        parse_flags(Command, ["tiny", "--fast", "more"])


def test_a_field_without_value_is_refused_by_name():
    with pytest.raises(InputError, match="settings: out is not given"):
        make_config(prepare.PrepareConfig, parse_flags(prepare.PrepareConfig, ["x"]))


def test_fault_095_all_unknown_options_come_in_one_message():
    said = message("--nome", "z", "--n-layers=3", "--learning-rate", "1", "word")
    assert "--nome; perhaps you meant --name" in said
    assert "--n-layers; perhaps you meant --n_layer" in said
    assert "--learning-rate; here it is --lr" in said
    assert "'z'" not in said


def test_all_words_that_belong_to_no_option_come_in_one_message():
    assert message("a", "--lr", "1", "b") == "settings: 'a' belongs to no option; 'b' belongs to no option"


def test_all_mistakes_of_a_preset_come_in_one_message(tmp_path):
    said = message(preset=preset(tmp_path, "nome = 1\nlr = 'fast'"))
    assert "unknown setting nome" in said
    assert "lr = 'fast'" in said


BAD = {
    "n_embd": ("100", "n_head 3 must divide n_embd 100"),
    "dropout": ("1.0", "dropout 1.0"),
    "lr": ("0", "lr 0.0"),
    "warmup_steps": ("60", "warmup_steps 60 is more than max_steps 50"),
    "block_size": ("0", "block_size 0"),
    "eval_every": ("-1", "eval_every -1"),
    "micro_batch_size": ("3", "micro_batch_size 3 must divide global_batch_size 8"),
    "threads": ("-2", "threads -2"),
    "seed": ("-3", "seed -3"),
    "beta2": ("1", "beta2 1.0"),
}


def test_fault_097_all_problems_come_in_one_message_before_anything_is_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "Runtime", None)  # to touch the device raises TypeError
    words = [word for name, (value, _) in BAD.items() for word in (f"--{name}", value)]
    run = train_here("tiny", "--data", tmp_path / "absent", "--out", tmp_path / "out", "--n_head", "3", *words)
    assert run.code == 2
    assert all(said in run.last for _, said in BAD.values())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", BAD)
def test_fault_097_each_problem_is_refused_on_its_own(name):
    value, said = BAD[name]
    heads = ["--n_head", "3"] if name == "n_embd" else []
    run = train_here("tiny", "--data", "x", *heads, f"--{name}", value)
    assert run.code == 2
    assert run.last.startswith("error: settings: ")
    assert said in run.last


def test_fault_098_a_program_is_no_settings_file(tmp_path):
    canary = tmp_path / "canary"
    program = tmp_path / "config.py"
    program.write_text(f"open({str(canary)!r}, 'w')\nlr = 1\n")
    run = train_here(program, "--data", "x")
    assert run.code == 2
    assert "TOML" in run.last
    assert not canary.exists()


def test_an_absent_settings_file_is_refused_by_name(tmp_path):
    run = train_here(tmp_path / "none.toml", "--data", "x")
    assert run.code == 2
    assert "none.toml: No such file" in run.last


def test_an_unknown_preset_is_answered_by_the_list_of_presets():
    run = train_here("shakespear3", "--data", "x")
    assert run.code == 2
    assert "shakespear3" in run.last
    assert all(path.stem in run.stderr for path in PRESETS)


def test_train_without_a_preset_lists_them_with_their_first_lines():
    run = train_here()
    assert run.code == 2
    assert run.last == "error: no preset given: they are listed above; choose one, as in python train.py demo"
    for path in PRESETS:
        assert path.read_text(encoding="utf-8").split("\n")[0].removeprefix("# ") in " ".join(run.stderr.split())


def test_a_folder_of_the_same_name_does_not_hide_a_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert find_preset("tiny", train.PRESETS) == train.PRESETS / "tiny.toml"


# ---- TOML

HARD = [
    'say "hi"',
    "back\\slash\\n",
    "tab\tline\nend",
    "naïve 雨 🌧",
    "it's",
    "",
    "\x7f\x00\x1b",
    "#no = comment",
    "a" * 300,
]


@pytest.mark.parametrize("text", HARD)
def test_a_string_survives_the_settings_file(tmp_path, text):
    path = preset(tmp_path, to_toml({"name": text, "stop": (text, "x")}))
    assert tomllib.loads(path.read_text(encoding="utf-8")) == {"name": text, "stop": [text, "x"]}
    assert read_toml(path, Config) == {"name": text, "stop": (text, "x")}


def other_value(known):
    """Returns a value that is not the default of a field."""
    if isinstance(known.default, bool):
        return not known.default
    if isinstance(known.default, (int, float)):
        return type(known.default)(known.default / 3 + 0.1) if isinstance(known.default, float) else known.default + 7
    choices = getattr(known.type, "__args__", ())
    return next(c for c in choices if c != known.default) if choices else 'quo"te \\ 雨'


def test_every_field_of_train_survives_the_settings_file(tmp_path):
    values = {name: other_value(known) for name, known in fields(train.TrainConfig).items()}
    assert read_toml(preset(tmp_path, to_toml(values)), train.TrainConfig) == values


@pytest.mark.parametrize("number", [1e-5, 6e-4, 1e22, 1.5e300, 5e-324, 0.1 + 0.2, 0.0, -2.5, 10.0])
def test_a_float_survives_the_settings_file_to_the_bit(tmp_path, number):
    assert read_toml(preset(tmp_path, to_toml({"lr": number})), Config) == {"lr": number}


def test_the_flat_values_of_a_configuration_make_it_again():
    config = Config(name="y", inner=Inner(3, 4.0))
    assert make_config(Config, flatten(config)) == config
    assert make_config(Config) == Config()


# ---- presets and help


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_loads_and_is_headed_by_size_command_and_expected_loss(path):
    values = read_toml(path, train.TrainConfig)
    assert values.keys() == tomllib.loads(path.read_text(encoding="utf-8")).keys()
    base = {"init": "gpt2"} if path.stem == "finetune" else {}
    assert make_config(train.TrainConfig, values, {"data": "x"} | base).data == "x"
    header = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert len(header) >= 2
    command = "train.py --init" if path.stem == "finetune" else f"train.py {path.stem}"
    assert any(command in line for line in header)
    said = " ".join(header).lower()
    assert "expected" in said or "not yet run" in said or path.stem == "finetune"  # whose loss is the text's


def test_presets_are_listed_by_name_in_two_columns(tmp_path):
    (tmp_path / "b.toml").write_text("# second\nlr = 1.0\n")
    (tmp_path / "a-name-longer-than-fourteen.toml").write_text("# first\n")
    assert list_presets(tmp_path) == "  a-name-longer-than-fourteen  first\n  b                            second"
    assert list_presets(tmp_path / "absent") == ""


SCRIPTS = {
    "train.py": (train, train.CommandLine),
    "sample.py": (sample, sample.SampleConfig),
    "data/prepare.py": (prepare, prepare.PrepareConfig),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_explains_every_field_and_ends_with_0(name, monkeypatch):
    module, cls = SCRIPTS[name]
    monkeypatch.setenv("COLUMNS", "100")
    run = in_process(module.main, name, "--help")
    assert run.code == 0
    lines = run.stdout.splitlines()
    for setting in fields(cls):
        place = next((i for i, line in enumerate(lines) if mentions(line, setting)), None)
        assert place is not None, f"{setting} is not in the help"
        text = " ".join(line.strip() for line in lines[place : place + 3])
        explanation = text.split("(default")[0].split("(required")[0].split()
        assert len([word for word in explanation if word[0].islower()]) >= 2, f"{setting}: {text}"


def test_help_after_a_preset_shows_its_values_beside_the_defaults(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")

    def lines(*words):
        run = in_process(train.main, "train.py", *words)
        assert (run.code, run.stderr) == (0, "")
        return run.stdout.splitlines()

    plain, tiny = lines("--help"), lines("--data", "x", "tiny", "--help")
    changed = {new for old, new in zip(plain, tiny, strict=True) if new != old}
    assert len(changed) == len(read_toml(train.PRESETS / "tiny.toml", train.TrainConfig))
    assert all("; tiny: " in line for line in changed)
    assert "  --n_layer INT         transformer blocks (default: 12; tiny: 2)" in changed
    own = preset(tmp_path, 'schedule = "linear"\nwandb = "100%"\n')
    changed = set(lines("-h", own)) - set(plain)
    assert {line[line.index("(") :] for line in changed} == {"(default: cosine; mine: linear)", "(mine: 100%)"}
    assert lines("x" * 5000, "--help") == plain
    bad = in_process(train.main, "train.py", preset(tmp_path, "lrr = 1"), "--help")
    assert (bad.code, bad.stdout) == (2, "")


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_and_the_list_of_presets_fit_a_terminal(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    texts = [in_process(SCRIPTS[name][0].main, name, "--help").stdout, in_process(plot.main, "plot", "-h").stdout]
    texts += [list_presets(train.PRESETS), interactive.HELP]
    for line in "\n".join(texts).splitlines():
        assert len(line) < 80 and not line.endswith(" "), line
    assert "python train.py --init gpt2 --data data/mine    fine-tunes GPT-2\n" in texts[0] or name != "train.py"


@pytest.mark.parametrize("word", ["--help", "--version"])
def test_help_that_nobody_reads_is_no_failure(processes, word):
    read, write = os.pipe()
    os.close(read)
    done = processes.open("training_helpers.run_script", "train.py", word, stdout=write)
    os.close(write)
    assert (done.communicate()[1], done.returncode) == (b"", 0)


def mentions(line, setting):
    names = {"inputs": "INPUT…", "checkpoint": "CHECKPOINT", "preset": "PRESET"}
    return line.replace(",", " ").split()[:1] == [names.get(setting, f"--{setting}")]


@pytest.mark.parametrize("name", SCRIPTS)
def test_version_says_name_and_version_and_ends_with_0(name):
    run = in_process(SCRIPTS[name][0].main, name, "--version")
    assert (run.code, run.stdout) == (0, f"gpt-text-generator {gpt.__version__}\n")


@pytest.mark.parametrize("command", ["gpt", "gpt prepare", "gpt plot", "gpt.plot"])
def test_every_command_says_its_version(command):
    module, *words = command.split()
    done = subprocess.run([sys.executable, "-m", module, *words, "--version"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"gpt-text-generator {gpt.__version__}\n", "")


@pytest.mark.parametrize("name", ["train", "sample"])
def test_the_commands_that_need_torch_say_it_too(processes, name):
    done = processes.open("training_helpers.run_script", "gpt/__main__.py", name, "--version")
    assert done.communicate() == [f"gpt-text-generator {gpt.__version__}\n".encode(), b""]
    assert done.returncode == 0


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_field_has_its_explanation_below_it(name):
    _, cls = SCRIPTS[name]
    texts = explanations(cls)
    assert texts.keys() == fields(cls).keys()
    assert all(len(text.split()) >= 2 for text in texts.values())


def test_the_script_itself_ends_with_the_code_and_the_line():
    run = run_train("tiny", "--data", "x", "--max_step", "3")
    assert run.code == 2
    assert run.last.startswith("error: ")
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["--lr", "nan", "--nome", "-h"]])
def test_the_help_says_how_to_call_the_program_and_shows_the_defaults(words, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpt train"])
    with pytest.raises(SystemExit) as stop:
        parse_flags(Config, words)
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith("usage: gpt train [")
    assert "(default: 0.001)" in said
    assert "a shape that loses 10 % a step (default: cosine)" in said


def test_fault_111_a_preset_of_a_name_too_long_for_a_file_is_unknown(tmp_path, capsys):
    with pytest.raises(InputError, match="no preset"):
        find_preset("x" * 5000, tmp_path)
