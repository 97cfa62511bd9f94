"""README's commands for one's own text run as they are written, on texts of any size: prepare, train, write, tune."""

import ast
import email
import io
import json
import re
import shlex
import tomllib
from pathlib import Path

import prepare
import pytest
from paths import ROOT
from training_helpers import QUICK, REPORT, in_process, save_step, text_of, tiny_model

import gpt
import sample
import train
from gpt.checkpoint.write import save_checkpoint
from gpt.generate.sampling import SamplingParams
from gpt.text.corpus import Corpus
from gpt.text.examples import chat_template
from gpt.text.shards import open_dataset
from gpt.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

README = (ROOT / "README.md").read_text(encoding="utf-8")
MAIN = {"data/prepare.py": prepare.main, "train.py": train.main, "sample.py": sample.main}
# What a test adds: a short run, and the machine.
ADDED = {
    "data/prepare.py": (),
    "train.py": ("--max_steps", "2", *QUICK),
    "sample.py": ("--max_new_tokens", "4", "--device", "cpu"),
}


def journeys(title):
    """README's blocks of shell commands below this title, each a list of commands as words."""
    section = README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    return [
        [shlex.split(line) for line in block.splitlines()] for block in re.findall(r"```sh\n(.*?)```", section, re.S)
    ]


SMALL = journeys("Your text")[0]
ON_EXAMPLES, ON_GPT2 = journeys("Fine-tune")


def follow(commands):
    """Runs README's commands in the current folder, and returns what they print."""
    done = []
    for _python, script, *words in commands:
        done.append(in_process(MAIN[script], script, *words, *ADDED[script]))
        assert done[-1].code == 0, done[-1].stderr
    return done


@pytest.fixture
def my_texts(tmp_path, monkeypatch):
    """An empty current folder but for my_texts/; returns a function that puts a text there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_texts").mkdir()
    return lambda text, name="a.txt": (tmp_path / "my_texts" / name).write_text(text, encoding="utf-8")


def manifest(folder):
    return json.loads((folder / "dataset.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("size", "tokenizer"),
    [(300, "byte"), (1_000, "byte"), (5_000, "byte"), (60_000, "byte"), (150_000, "bpe:"),
     pytest.param(2_000_000, "bpe:", marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_text_of_any_size_is_prepared_trained_on_and_continued_in_writing(size, tokenizer, my_texts, tmp_path):
    my_texts(text_of(size))
    prepared, _trained, written = follow(SMALL)
    assert manifest(tmp_path / "data/mine")["tokenizer"]["name"].startswith(tokenizer)
    assert "tokenizer: " in prepared.stdout
    assert written.stdout.startswith("Once upon a time")


@pytest.mark.parametrize("pieces", [20, 300])
def test_a_folder_of_short_poems_too(pieces, my_texts, tmp_path):
    for number in range(pieces):
        my_texts(text_of(60, seed=number), f"{number}.txt")
    follow(SMALL)
    assert (manifest(tmp_path / "data/mine")["source"]["split"]["rule"] == "hash") == (pieces >= 100)


@pytest.fixture
def gpt2_on_the_hub(tmp_path, bpe_cache, monkeypatch):
    """Makes "gpt2" on the hub a model with one small layer, GPT-2's vocabulary and its context of 1024."""
    tokenizer = load_tokenizer("gpt2")
    model = tiny_model(tokenizer.vocab_size, n_layer=1, n_embd=4, block_size=1024)
    about = {"dataset": {"train": []}, "code": "test"}
    folder = save_checkpoint(tmp_path / "hub", 1, model, tokenizer, {}, vars(SamplingParams()), about)
    monkeypatch.setattr("gpt.checkpoint.read.fetch_from_hub", lambda name: folder)


@pytest.mark.parametrize("size", [1_000, 5_000, pytest.param(60_000, marks=pytest.mark.slow)])
def test_gpt2_is_tuned_on_a_text_of_any_size(size, gpt2_on_the_hub, my_texts, tmp_path):
    my_texts(text_of(size))
    follow(ON_GPT2)
    settings = tomllib.loads((tmp_path / "out/tuned/config.toml").read_text(encoding="utf-8"))
    assert settings["block_size"] < 1024


def test_data_with_another_tokenizer_than_the_base_are_refused_with_the_command_that_helps(
    gpt2_on_the_hub, my_texts, tmp_path
):
    my_texts(text_of(5_000))
    follow(SMALL[:1])
    done = in_process(train.main, "train.py", "--init", "gpt2", "--data", "data/mine", "--out", "out/tuned", *QUICK)
    assert done.code == 2
    command = done.last.partition("python ")[2]
    assert command == "data/prepare.py my_texts/ --tokenizer gpt2 --out data/mine-gpt2"
    assert not (tmp_path / "out").exists()
    follow([["python", *shlex.split(command)]])
    follow([["python", "train.py", "--init", "gpt2", "--data", "data/mine-gpt2", "--out", "out/tuned"]])


def test_conversations_are_learned_and_talked_with_and_the_chat_template_goes_where_messages_were_learned(
    my_texts, tmp_path, monkeypatch
):
    turns = [("user", "{0}"), ("assistant", "{0}, {0}")]
    talks = [[{"role": role, "content": text.format(n)} for role, text in turns] for n in range(40)]
    my_texts("".join(json.dumps({"messages": messages}) + "\n" for messages in talks), "talks.jsonl")
    my_texts(text_of(5_000))

    def template(folder):
        return load_tokenizer(tmp_path / folder).additions.chat_template

    def train_on(text, name, *words):
        prepared = ["python", "data/prepare.py", f"my_texts/{text}", "--out", f"data/{name}", "--tokenizer", "byte"]
        trained = follow([prepared, ["python", "train.py", *words, "--data", f"data/{name}", "--out", f"out/{name}"]])[
            1
        ]
        assert trained.last.endswith(" --chat") == text.startswith("talks")

    def chat(name):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"2\n")))
        return in_process(sample.main, "sample.py", f"out/{name}", "--chat", "--max_new_tokens", "4", "--device", "cpu")

    train_on("talks.jsonl", "talks", "demo")
    assert template("out/talks") == chat_template(load_tokenizer("byte"))
    assert chat("talks").code == 0
    train_on("a.txt", "more", "--init", "out/talks")
    assert template("out/more") == template("out/talks") != template("data/more")
    train_on("a.txt", "text", "demo")
    assert template("out/text") == ""
    assert "this model has not learned from messages" in chat("text").last
    train_on("talks.jsonl", "tuned", "--init", "out/text")
    assert template("out/tuned") == template("out/talks")


# ---- examples


def test_the_commands_for_examples_run_on_any_model_of_ones_own(my_texts, tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda _: Path(email.__file__).parent)  # a part of the library
    save_step(tmp_path / "out/demo", 1, tiny_model(n_layer=1, block_size=64))
    monkeypatch.setattr(train, "report", REPORT)
    written = follow(ON_EXAMPLES)[-1]
    assert written.stdout.startswith('"""Return True if the queue is empty."""\n')
    assert "fine-tuned from `out/demo`" in (tmp_path / "out/functions/report.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_model_of_the_first_line_learns_to_write_functions_after_docstrings(my_texts, tmp_path):
    """Seven minutes on two cores: at least 80 % of the functions that it writes after 50 held-out docstrings are valid
    Python, and less than 20 % before."""
    prepared = "data/prepare.py --corpus stdlib --tokenizer bpe:2048 --out data/stdlib"
    for script, *words in [prepared.split(), ["train.py", "demo", "--max_minutes", "0", "--max_steps", "1000"]]:
        assert in_process(MAIN[script], script, *words).code == 0
    for _python, script, *words in ON_EXAMPLES[:2]:
        assert in_process(MAIN[script], script, *words).code == 0
    corpus = Corpus(open_dataset("data/functions"), "", "size", 128, 16, 1)
    prompts = [corpus.tokenizer.decode(prompt) for prompt, _ in corpus.held_out(50, 0)]
    before, after = (
        sum(is_function(done.text) for [done] in gpt.load(run).generate(prompts, max_new_tokens=200, temperature=0.0))
        for run in ("out/demo", "out/functions")
    )
    assert (len(prompts), before < 10, after >= 40) == (50, True, True), (before, after)


def is_function(text):
    try:
        return text.startswith("def ") and bool(ast.parse(text))
    except SyntaxError:
        return False
