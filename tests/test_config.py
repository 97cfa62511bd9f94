"""Settings: precedence, `given`, every kind of mistake and its message, TOML, presets, help."""

import contextlib
import dataclasses
import io
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import prepare
import pytest
from training_helpers import in_process, run_train, train_here

import sample
import train
from gpt.config import (
    OTHER_NAMES,
    check_preset_comes_first,
    defaults,
    fields,
    find_preset,
    flatten,
    from_cli,
    list_presets,
    peek,
    read_toml,
    refuse,
    suggestion,
    to_toml,
    unflatten,
)
from gpt.errors import InputError

ROOT = Path(train.__file__).parent
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
    """a shape"""
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
    with pytest.raises(InputError) as caught, contextlib.redirect_stderr(io.StringIO()):
        from_cli(Config, list(argv), **keywords)
    return str(caught.value)


# ---- precedence and given


def test_flags_win_over_the_preset_that_over_the_base_that_over_the_defaults(tmp_path):
    toml = preset(tmp_path, "lr = 2.0\nn_layer = 2")
    base = {"lr": 3.0, "n_layer": 3, "name": "base"}
    config, given = from_cli(Config, ["--n_layer", "1"], base, toml)
    assert flatten(config) == {
        "name": "base",
        "schedule": "cosine",
        "fast": False,
        "stop": (),
        "n_layer": 1,
        "lr": 2.0,
    }
    assert given == {"n_layer", "lr"}


def test_given_names_a_flag_that_repeats_the_default():
    config, given = from_cli(Config, ["--n_layer", "12", "--fast"])
    assert config == Config(fast=True)
    assert given == {"n_layer", "fast"}


@pytest.mark.parametrize("words", [["--n_layer", "4"], ["--n-layer", "4"], ["--n_layer=4"], ["--n-layer=4"]])
def test_dashes_underscores_and_equals_signs_mean_the_same(words):
    config, given = from_cli(Config, words)
    assert (config.inner.n_layer, given) == (4, {"n_layer"})


def test_an_integer_in_toml_is_a_float_where_a_float_is_wanted(tmp_path):
    config, _ = from_cli(Config, [], preset=preset(tmp_path, "lr = 1"))
    assert type(config.inner.lr) is float


def test_a_preset_completed_by_flags_is_checked_only_as_a_whole(tmp_path):
    config, _ = from_cli(Config, ["--n_layer", "1"], preset=preset(tmp_path, "n_layer = -1"))
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


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_fault_095_names_of_other_programs_are_answered_with_ours(name):
    ours = OTHER_NAMES[name].split(" ")[0]
    classes = [cls for cls in (train.TrainConfig, sample.SampleConfig) if ours in fields(cls)]
    assert classes, f"{name} is mapped to {ours}, which does not exist"
    assert all(f"--{ours}" in suggestion(name, fields(cls), "--") for cls in classes)
    assert all(name not in fields(cls) for cls in classes)


def test_a_bare_batch_size_is_refused_naming_both_sizes():
    run = train_here("tiny", "--data", "x", "--batch_size", "8")
    assert run.code == 2
    assert "--global_batch_size" in run.last
    assert "--micro_batch_size" in run.last


@pytest.mark.parametrize("value", ["1e3", "8.5", "true", "", "nan", "9" * 5000])
def test_fault_096_what_is_no_int_is_refused_naming_option_value_and_type(value):
    for words in (["--n_layer", value], [f"--n_layer={value}"]):
        said = message(*words)
        assert f"--n_layer {value!r}" in said
        assert "int" in said


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999", "fast", ""])
def test_fault_096_what_is_no_finite_float_is_refused_naming_option_value_and_type(value):
    for words in (["--lr", value], [f"--lr={value}"]):
        said = message(*words)
        assert f"--lr {value!r}" in said
        assert "finite float" in said


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_fault_096_nan_and_inf_in_a_preset_are_refused(tmp_path, value):
    said = message(preset=preset(tmp_path, f"lr = {value}"))
    assert "mine.toml: lr = " in said
    assert "finite float" in said


def test_fault_096_every_float_setting_of_train_refuses_nan():
    names = [name for name, known in fields(train.TrainConfig).items() if known.type is float]
    assert len(names) > 8
    for name in names:
        with pytest.raises(InputError, match=f"--{name} 'nan': not a finite float"):
            from_cli(train.TrainConfig, ["--data", "x", "--max_steps", "1", f"--{name}", "nan"])


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
    ],
)
def test_a_preset_line_of_the_wrong_kind_is_refused(tmp_path, line, said):
    assert said in message(preset=preset(tmp_path, line))


def test_several_mistakes_of_one_kind_come_in_one_message(tmp_path):
    said = message("--n_layer", "x", "--lr", "y", "--nome", "z")
    assert all(part in said for part in ("--n_layer 'x'", "--lr 'y'", "unknown option --nome"))
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
    monkeypatch.setattr(train, "Runtime", None)  # whoever touches the device fails otherwise than expected
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
    assert run.last.startswith("error: no preset given")
    for path in PRESETS:
        assert path.read_text(encoding="utf-8").split("\n")[0].removeprefix("# ") in run.stderr


def test_a_folder_of_the_same_name_does_not_hide_a_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert find_preset("tiny", train.PRESETS) == train.PRESETS / "tiny.toml"


def test_peek_reads_a_flag_before_the_flags_are_parsed():
    assert peek(["--a", "--init", "gpt2"], "init") == "gpt2"
    assert peek(["--init=a=b", "--init2", "c"], "init") == "a=b"
    assert peek(["--init"], "init") == ""


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
    """A value that is not the default of a field."""
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


def test_flatten_and_unflatten_are_inverse():
    config = Config(name="y", inner=Inner(3, 4.0))
    assert unflatten(Config, flatten(config)) == config
    assert defaults(Config) == flatten(Config())


# ---- presets and help


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_loads_and_is_headed_by_size_command_and_expected_loss(path):
    config, given = from_cli(train.TrainConfig, ["--data", "x"], preset=path)
    assert given == {"data", *tomllib.loads(path.read_text(encoding="utf-8"))}
    assert config.data == "x"
    header = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert len(header) >= 2
    command = "train.py --init" if path.stem == "finetune" else f"train.py {path.stem}"
    assert any(command in line for line in header)
    said = " ".join(header).lower()
    assert "expected" in said or "not yet run" in said or path.stem == "finetune"  # whose loss is the text's


def test_presets_are_listed_one_a_line(tmp_path):
    (tmp_path / "b.toml").write_text("# second\nlr = 1.0\n")
    (tmp_path / "a.toml").write_text("# first\n")
    assert [line.split() for line in list_presets(tmp_path).splitlines()] == [["a", "first"], ["b", "second"]]


SCRIPTS = {
    "train.py": (train, train.TrainConfig),
    "sample.py": (sample, sample.SampleConfig),
    "data/prepare.py": (prepare, prepare.PrepareConfig),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_explains_every_field_and_ends_with_0(name, monkeypatch):
    module, cls = SCRIPTS[name]
    monkeypatch.setenv("COLUMNS", "100")
    run = in_process(module.main, name, "--help")
    assert run.code == 0
    lines = run.stdout.splitlines()  # one column of boxes at this width
    for setting in fields(cls):
        place = next((i for i, line in enumerate(lines) if mentions(line, setting)), None)
        assert place is not None, f"{setting} is not in the help"
        text = " ".join(line.strip("│ ") for line in lines[place : place + 3])
        explanation = text.split("(default")[0].split("(required")[0].split()
        assert len([word for word in explanation if word[0].islower()]) >= 2, f"{setting}: {text}"


def mentions(line, setting):
    words = line.strip("│ ").replace(",", " ").split()
    positional = (setting.upper(), "[[STR")  # a name, or several values without one
    return bool(words) and (words[0] == f"--{setting}" or words[0] in positional)


def doc_strings(cls):
    """Field name -> whether a docstring follows it in the source."""
    import ast
    import inspect
    import textwrap

    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    found = {}
    for node, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign):
            text = getattr(getattr(following, "value", None), "value", None)
            found[node.target.id] = isinstance(text, str) and len(text.split()) >= 2
    return found


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_field_has_its_explanation_beside_it(name):
    todo = [SCRIPTS[name][1]]
    while todo:
        cls = todo.pop()
        explained = doc_strings(cls)
        for known in dataclasses.fields(cls):
            if dataclasses.is_dataclass(known.type):
                todo.append(known.type)
            else:
                assert explained[known.name], f"{cls.__name__}.{known.name} has no explanation"


def test_the_script_itself_ends_with_the_code_and_the_line():
    run = run_train("tiny", "--data", "x", "--max_step", "3")
    assert run.code == 2
    assert run.last.startswith("error: ")
    assert "Traceback" not in run.stderr


def test_the_list_of_presets_is_in_two_columns(tmp_path):
    for name in ("a", "a-name-longer-than-fourteen"):
        (tmp_path / f"{name}.toml").write_text("# what it is\n")
    lines = list_presets(tmp_path).splitlines()
    assert {line.index("what it is") for line in lines} == {len("  a-name-longer-than-fourteen  ")}
    assert list_presets(tmp_path / "absent") == ""


def test_the_help_says_how_to_call_the_program(capsys):
    with pytest.raises(SystemExit) as stop:
        from_cli(Config, ["--help"], usage="train.py PRESET")
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("usage: train.py PRESET [")


@pytest.mark.parametrize(
    "words", [("--name", "x", "tiny"), ("--name=x", "tiny"), ("--fast", "tiny"), ("--no-fast", "tiny")]
)
def test_a_preset_behind_the_options_is_told_to_come_first(words):
    with pytest.raises(InputError, match=r"'tiny' belongs to no option; if it is the preset, give it first"):
        check_preset_comes_first(Config, words)


@pytest.mark.parametrize("words", [(), ("-h",), ("--name", "tiny"), ("--lr", "-1", "--fast"), ("--unknown", "5")])
def test_words_that_belong_to_an_option_are_no_preset(words):
    check_preset_comes_first(Config, words)


def test_fault_111_a_preset_of_a_name_too_long_for_a_file_is_unknown(tmp_path, capsys):
    with pytest.raises(InputError, match="no preset"):
        find_preset("x" * 5000, tmp_path)
