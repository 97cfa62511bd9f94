"""Our folders in other programs: transformers 4 and 5 with TRL and peft, each in an environment of its own (slow)."""

import json
import os
import site
import subprocess
import venv

import pytest
import torch
from checkpoint_helpers import save
from example_helpers import conversations
from foreign_helpers import CASES, check_answer
from paths import ROOT
from tokenizer_helpers import small_tokenizer
from training_helpers import tiny_model

from gpt.generate.generator import TextGenerator
from gpt.text.examples import Turn, chat_template, encode_example
from gpt.text.tokenizer import load_tokenizer

ENVIRONMENTS = {  # the newest of each generation; TRL and peft as they fit
    "4": ("transformers==4.57.*", "huggingface_hub<1", "trl==0.24.*", "peft==0.18.*", "accelerate", "datasets"),
    "5": ("transformers>=5.23,<6", "trl", "peft", "accelerate", "datasets"),
}
TEXTS = ["The sea was calm", " 12 gulls,  naïve; 雨 😀\n", "once upon a time"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=sorted(ENVIRONMENTS))
def python(request, tmp_path_factory):
    """The Python of an environment with another transformers, over the packages of this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    program = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    place = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    own = subprocess.run([program, "-c", place], capture_output=True, text=True, check=True).stdout.strip()
    with open(os.path.join(own, "zz_outer.pth"), "w") as file:  # torch and its packages need not be installed again
        file.write("\n".join(site.getsitepackages()))
    install = [program, "-m", "pip", "install", "-q", "--no-input", *ENVIRONMENTS[request.param]]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no package index: {done.stderr.splitlines()[-1]}")
    return str(program)


def run(python, *arguments):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "tests"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([python, *map(str, arguments)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def answers(python, bpe_cache, tmp_path_factory):
    """Folders of ours with three kinds of tokenizer: (name -> folder, what the other environment answers)."""
    root = tmp_path_factory.mktemp("ours")
    tokenizers = {"byte": load_tokenizer("byte"), "bpe": small_tokenizer(), "gpt2": load_tokenizer("gpt2")}
    folders = {
        name: save(
            tiny_model(tokenizer.vocab_size, block_size=64),
            tokenizer.with_chat_template(chat_template(tokenizer)),
            root / name,
        )
        for name, tokenizer in tokenizers.items()
    }
    request = {"folders": {name: str(folder) for name, folder in folders.items()}, "texts": TEXTS, "dir": str(root)}
    request |= {"conversations": list(conversations(200))}
    (root / "request.json").write_text(json.dumps(request), encoding="utf-8")
    run(python, ROOT / "tests/checkpoint/other_programs.py", root / "request.json")
    return folders, json.loads((root / "answers.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["byte", "bpe", "gpt2"])
def test_transformers_trl_and_peft_read_our_folder(name, answers):
    folders, answers = answers
    theirs, generator = answers[name], TextGenerator.load(folders[name], device="cpu", dtype="fp32")
    tokenizer = generator.tokenizer
    ids = [tokenizer.encode(text) for text in TEXTS]
    assert theirs["names"] == ["attention_mask", "input_ids"]
    assert theirs["ids"] == ids
    assert theirs["masked"] == list(map(len, ids))
    assert theirs["with_eos"] == [*ids[0], tokenizer.eot]
    with torch.no_grad():
        logits = generator.model(torch.tensor([ids[0]]))[0, : tokenizer.vocab_size]
    torch.testing.assert_close(torch.tensor(theirs["logits"]), logits, atol=1e-4, rtol=0)
    [[ours]] = generator.generate(TEXTS[0], max_new_tokens=12, temperature=0)
    assert [i for i in theirs["greedy"] if i != tokenizer.eot] == ours.ids
    assert theirs["pipeline"] == TEXTS[0] + ours.text
    completion = [*tokenizer.encode(" yes"), tokenizer.eot]
    assert theirs["trl"] == [[*prompt, *completion] for prompt in ids]
    assert theirs["loss"] > 0
    chats = [tuple(Turn(**message) for message in messages) for messages in conversations(200)]
    assert theirs["chats"] == [encode_example(turns, tokenizer)[0].tolist() for turns in chats]
    merged = TextGenerator.load(theirs["merged"], device="cpu", dtype="fp32")  # a new adapter changes nothing
    assert merged.generate(TEXTS[0], max_new_tokens=12, temperature=0)[0][0].ids == ours.ids


def test_folders_that_this_transformers_writes_are_read_as_it_reads_them(python, tmp_path):
    run(python, ROOT / "tests/foreign_helpers.py", tmp_path / "foreign")
    answers = json.loads((tmp_path / "foreign/answers.json").read_text(encoding="utf-8"))
    for case in CASES:
        check_answer(tmp_path / "foreign" / case.__name__, answers[case.__name__])
