"""The names that people bring from other programs: ours, or what is done instead."""

import re

import prepare
import pytest
from training_helpers import train_here

import sample
import train
from gpt.config import fields, parse_flags
from gpt.config.names import NOT_OFFERED, OTHER_NAMES, suggestion
from gpt.errors import InputError
from gpt.report.export import ExportConfig

COMMANDS = (train.CommandLine, sample.SampleConfig, prepare.PrepareConfig, ExportConfig)
KNOWN = set().union(*map(fields, COMMANDS))
SIMILAR = {  # `suggestion` finds them without a table
    "warmup_iters": "warmup_steps",
    "lr_decay_iters": "decay_steps",
    "eval_interval": "eval_every",
    "out_dir": "out",
    "dataset": "data",
}
PROGRAMS = {  # what people type, command by command, and the first word of the answer
    "gpt-2-simple": [
        (sample.SampleConfig, {"prefix": "prompt", "length": "max_new_tokens", "nsamples": "num_samples"}),
        (sample.SampleConfig, {"batch_size": "rows", "model_name": "CHECKPOINT", "include_prefix": None}),
        (train.TrainConfig, {"steps": "max_steps", "restore_from": "resume", "print_every": "log_every"}),
        (train.TrainConfig, {"run_name": "out", "model_name": "init", "multi_gpu": None, "learning_rate": "lr"}),
    ],
    "aitextgen": [
        (sample.SampleConfig, {"n": "num_samples", "max_length": "max_new_tokens", "to_gpu": "device"}),
        (train.TrainConfig, {"num_steps": "max_steps", "generate_every": "sample_every", "fp16": "dtype"}),
        (train.TrainConfig, {"line_by_line": "data"}),
        (prepare.PrepareConfig, {"line_by_line": "split_on lines", "file_path": "INPUTS"}),
        (
            train.TrainConfig,
            {"n_gpu": None, "freeze_layers": "freeze", "gradient_checkpointing": "checkpoint_activations"},
        ),
    ],
    "run_clm": [
        (train.TrainConfig, {"model_name_or_path": "init", "output_dir": "out", "num_train_epochs": "max_epochs"}),
        (train.TrainConfig, {"per_device_train_batch_size": "micro_batch_size", "fp16": "dtype", "bf16": "dtype"}),
        (train.TrainConfig, {"do_train": None, "dataset_name": None, "push_to_hub": None, "report_to": "wandb"}),
        (train.TrainConfig, {"train_file": "data", "evaluation_strategy": "eval_every", "deepspeed": None}),
        (prepare.PrepareConfig, {"train_file": "INPUTS", "validation_file": "val", "num_proc": "workers"}),
        (sample.SampleConfig, {"num_beams": None, "no_repeat_ngram_size": "no_repeat_ngram", "k": "top_k"}),
    ],
    "llama.cpp": [
        (sample.SampleConfig, {"n_predict": "max_new_tokens", "temp": "temperature", "model": "CHECKPOINT"}),
        (sample.SampleConfig, {"repeat_penalty": "repetition_penalty", "reverse_prompt": "stop", "mirostat": None}),
        (sample.SampleConfig, {"ignore_eos": "ignore_eot", "ngl": "device", "grammar": None, "file": "prompts"}),
        (ExportConfig, {"outfile": "gguf", "outtype": "type", "model": "CHECKPOINT"}),
        (sample.SampleConfig, {"-n": "max_new_tokens", "-p": "prompt", "-m": "CHECKPOINT", "-t": "threads"}),
    ],
}


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_fault_095_every_name_of_the_table_is_answered_with_ours(name):
    for ours in OTHER_NAMES[name].split(" | "):
        word = ours.split(" ")[0]
        assert word.lower() in KNOWN, f"{name} is mapped to {word}, which does not exist"
        assert word.islower() or word.isupper()
    for cls in COMMANDS:
        known = fields(cls)
        ours = [part for part in OTHER_NAMES[name].split(" | ") if part.split(" ")[0].lower() in known]
        if ours:
            assert name not in known
            dashes = "" if ours[0].split(" ")[0].isupper() else "--"
            assert suggestion(name, known, "--") == f"here it is {dashes}{ours[0]}"


@pytest.mark.parametrize("program", PROGRAMS)
def test_fault_095_what_people_type_is_answered_with_ours_or_not_offered(program):
    for cls, names in PROGRAMS[program]:
        for name, ours in names.items():
            said = suggestion(name, fields(cls), "--")
            expected = "not offered: " if ours is None else f"here it is {'' if ours.isupper() else '--'}{ours}"
            assert re.match(rf"{re.escape(expected)}( |$)" if ours else expected, said), (name, said)


@pytest.mark.parametrize("name", SIMILAR)
def test_fault_095_similar_names_need_no_table(name):
    assert f"perhaps you meant --{SIMILAR[name]}" in suggestion(name, fields(train.TrainConfig), "--")
    assert name not in OTHER_NAMES | NOT_OFFERED


def test_what_is_not_offered_is_no_setting_and_has_a_reason():
    assert not NOT_OFFERED.keys() & KNOWN
    assert all(len(reason.split()) > 1 for reason in NOT_OFFERED.values())
    flags = re.findall(r"--(\w+)", " ".join(NOT_OFFERED.values()))
    assert set(flags) <= KNOWN


@pytest.mark.parametrize(
    "words, said",
    [
        (["--num_beams", "4"], "unknown option --num_beams; not offered: no beam search; --temperature 0 is greedy"),
        (["--no-repeat-ngram-size=3"], "unknown option --no-repeat-ngram-size; here it is --no_repeat_ngram"),
        (["gpt2", "-n", "100"], "'-n' belongs to no option; here it is --max_new_tokens; '100' belongs to no option"),
        (["gpt2", "-x"], "'-x' belongs to no option"),
    ],
)
def test_fault_095_the_command_line_gives_these_answers(words, said):
    with pytest.raises(InputError) as caught:
        parse_flags(sample.SampleConfig, words)
    assert str(caught.value) == f"settings: {said}"


def test_a_bare_batch_size_is_refused_naming_both_sizes():
    run = train_here("tiny", "--data", "x", "--batch_size", "8")
    assert run.code == 2
    assert "--global_batch_size" in run.last
    assert "--micro_batch_size" in run.last
