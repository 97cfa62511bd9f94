"""For tests of models that others made: small GPT-2 folders, written by transformers and tokenizers alone.

`python foreign_helpers.py DIR` writes all of them, and what the installed transformers answers, to DIR/answers.json."""

import json
import sys
from pathlib import Path

import pytest
import torch

TEXT = ["the cat sat on the mat. ", "a cat's 12 mats, naïve; then it rained in there\n", "  no  more, 雨 😀 "] * 9
MIXED = "the cat<|endoftext|> sat<|user|> on</s>  the\n\n    mat's <s>12</s>[PAD]<|im_end|> naïve 雨😀 theatre<mask> it"
PROMPT = "the cat"
EOT = "<|endoftext|>"


def trained(first=(EOT,), size=300):
    """Returns a byte-level BPE of the package tokenizers; the special tokens `first` get the first ids."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(TEXT, vocab_size=size, special_tokens=list(first), show_progress=False)
    return tokenizer._tokenizer


def wrapped(tokenizer=None, **roles):
    """Returns a PreTrainedTokenizerFast with these roles; without any, bos and eos are end-of-text."""
    from transformers import PreTrainedTokenizerFast

    roles = roles or {"bos_token": EOT, "eos_token": EOT}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer or trained(), **roles)


def template(single, **ids):
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(single=single, special_tokens=list(ids.items()))


def save_model(folder, rows, eos=0, seed=0, **settings):
    """Writes a random GPT2LMHeadModel of transformers with `rows` ids; `eos` is an id or a list of ids."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    first = eos[0] if isinstance(eos, list) else eos
    config = GPT2Config(
        vocab_size=rows, n_layer=1, n_head=2, n_embd=16, n_positions=128, bos_token_id=first, **settings
    )
    config.eos_token_id = first
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    model.generation_config.eos_token_id = eos
    model.save_pretrained(folder)
    return model


def always_choose(model, folder, chosen):
    """Changes and saves the weights so that the likeliest id is always `chosen`."""
    with torch.no_grad():
        model.transformer.wte.weight[chosen] = 5.0
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(5.0)
    model.save_pretrained(folder)


def write(folder, **files):
    """Writes JSON files: write(folder, added_tokens={...}) makes added_tokens.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")


def write_files(folder, tokenizer, **files):
    """Writes the older spelling of a tokenizer, `vocab.json` and `merges.txt`, and other JSON files."""
    write(folder, **files)
    tokenizer.model.save(str(folder))


def edit(folder, name, change):
    """Applies `change` to the values of a JSON file."""
    path = folder / name
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")


# ---- the folders


def plain(folder):
    wrapped().save_pretrained(folder)
    save_model(folder, 300)


def specials_first(folder):
    wrapped(trained(("<s>", "<pad>", "</s>")), bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    save_model(folder, 300, 2)


def files_specials_first(folder):
    write_files(folder, trained(("<s>", "<pad>", "</s>")), tokenizer_config={"eos_token": "</s>"})
    save_model(folder, 300, 2)


def files_named_in_the_map(folder):
    roles = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "unk_token": "<s>"}
    write_files(folder, trained(("<s>", "</s>")), special_tokens_map=roles)
    save_model(folder, 300, 1)


def files_added(folder):
    write_files(
        folder, trained(), tokenizer_config={"pad_token": "[PAD]"}, added_tokens={"[PAD]": 300, "<|user|>": 301}
    )
    save_model(folder, 302)


def files_bos(folder):
    write_files(folder, trained(), tokenizer_config={"add_bos_token": True})
    save_model(folder, 300)


def files_other_bos(folder):
    settings = {"add_bos_token": True, "bos_token": "<s>", "unk_token": "</s>", "eos_token": "</s>"}
    write_files(folder, trained(("<s>", "</s>")), tokenizer_config=settings)
    save_model(folder, 300, 1)


def files_no_special(folder):
    write_files(folder, trained(()))
    save_model(folder, 301, 300)


def files_of_roberta(folder):
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "</s>", "tokenizer_class": "RobertaTokenizer"}
    write_files(folder, trained(("<s>", "</s>")), tokenizer_config=roles)
    save_model(folder, 301, 1)


def added_ordinary(folder):
    tokenizer = wrapped()
    tokenizer.add_tokens(["<|user|>", "  ", "    ", "the", "mat's"])  # one is a token of the BPE, one begins another
    tokenizer.save_pretrained(folder)
    save_model(folder, len(tokenizer))


def added_special(folder):
    tokenizer = wrapped()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|user|>:", "[PAD]"]})
    tokenizer.save_pretrained(folder)
    save_model(folder, len(tokenizer))


def added_both(folder):
    tokenizer = wrapped()
    tokenizer.add_tokens(["<|user|>", "fox\n"])
    tokenizer.add_special_tokens({"pad_token": "[PAD]", "mask_token": "<mask>"})
    tokenizer.save_pretrained(folder)
    model = save_model(folder, len(tokenizer) + 13)  # rows padded to a round number
    with torch.no_grad():
        model.transformer.wte.weight[len(tokenizer) :] = 0
    model.save_pretrained(folder)


def added_lstrip(folder):
    from tokenizers import AddedToken

    tokenizer = wrapped()
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True)])
    tokenizer.save_pretrained(folder)
    save_model(folder, len(tokenizer))


def named_in_settings_alone(folder):
    wrapped(trained(("<s>", "</s>"))).save_pretrained(folder)
    edit(folder, "tokenizer.json", lambda stored: stored.update(added_tokens=[]))
    changes = {"eos_token": "</s>", "bos_token": "<s>", "pad_token": "[PAD]"}
    edit(folder, "tokenizer_config.json", lambda settings: settings.update(changes))
    edit(folder, "tokenizer_config.json", lambda settings: settings.pop("added_tokens_decoder", None))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    save_model(folder, 301, 1)


def pad_not_resized(folder):
    wrapped(trained(), bos_token=EOT, eos_token=EOT, pad_token="[PAD]").save_pretrained(folder)
    save_model(folder, 300)


def other_eos(folder):
    wrapped(trained(), bos_token=EOT, eos_token="<|im_end|>").save_pretrained(folder)
    always_choose(save_model(folder, 301, 300), folder, 300)


def second_of_two_eos(folder):
    wrapped(trained((EOT, "<|im_end|>"))).save_pretrained(folder)
    always_choose(save_model(folder, 300, [0, 1]), folder, 1)


def eos_in_config_alone(folder):
    wrapped(trained((EOT, "<|im_end|>"))).save_pretrained(folder)
    always_choose(save_model(folder, 300, 1), folder, 1)
    (folder / "generation_config.json").unlink()


def bos_template(folder):
    tokenizer = trained()
    tokenizer.post_processor = template(f"{EOT} $A", **{EOT: 0})
    wrapped(tokenizer).save_pretrained(folder)
    save_model(folder, 300)


def other_template(folder):
    tokenizer = trained(("<s>", "</s>"))
    tokenizer.post_processor = template("<s> $A </s>", **{"<s>": 0, "</s>": 1})
    wrapped(tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    save_model(folder, 300, 1)


def all_roles(folder):
    roles = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "[PAD]",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    }
    wrapped(trained(("<s>", "</s>", "<unk>")), **roles).save_pretrained(folder)
    save_model(folder, 302, 1)


def merges_as_text(folder):
    plain(folder)
    edit(folder, "tokenizer.json", lambda t: t["model"].update(merges=[" ".join(m) for m in t["model"]["merges"]]))


def eos_as_object(folder):
    plain(folder)
    token = {"__type": "AddedToken", "content": EOT, "lstrip": False, "normalized": True, "rstrip": False}
    edit(folder, "tokenizer_config.json", lambda settings: settings.update(eos_token=token | {"single_word": False}))


CASES = (plain, specials_first, files_specials_first, files_named_in_the_map, files_added, files_bos, files_other_bos)
CASES += (files_no_special, files_of_roberta, added_ordinary, added_special, added_both, added_lstrip)
CASES += (named_in_settings_alone, pad_not_resized, other_eos, second_of_two_eos, eos_in_config_alone)
CASES += (bos_template, other_template, all_roles, merges_as_text, eos_as_object)
REFUSED = {  # name of a folder -> part of the line that refuses it
    "files_other_bos": "add_bos_token with <s> is not supported",
    "files_of_roberta": "tokenizer_class RobertaTokenizer is not supported",
    "added_lstrip": "added token '<mask>' with lstrip is not supported",
    "other_template": "post_processor TemplateProcessing is not supported",
}


# ---- what transformers answers


def answer(folder):
    """Returns a mixed text without tokens that the model has no row for, its ids, and the ids that the model continues
    PROMPT with, greedily, up to the end of the text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    text = MIXED
    for token in tokenizer.get_added_vocab():
        if max(tokenizer(token).input_ids) >= model.config.vocab_size:
            text = text.replace(token, "")
    prompt = tokenizer(PROMPT, return_tensors="pt")
    made = model.generate(prompt.input_ids, max_new_tokens=24, do_sample=False, pad_token_id=0)[0]
    return {"text": text, "ids": tokenizer(text).input_ids, "greedy": made[prompt.input_ids.shape[1] :].tolist()}


def write_all(root):
    """Writes all folders, and answers.json: name -> answer(folder)."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    answers = {}
    for case in CASES:
        folder = root / case.__name__
        folder.mkdir(parents=True)
        case(folder)
        answers[case.__name__] = answer(folder)
    write(root, answers=answers)


def check_answer(folder, expected):
    """Asserts that this program gives the ids and the greedy text of transformers, or refuses the folder by name."""
    from gpt.errors import InputError
    from gpt.generate.generator import TextGenerator

    if folder.name in REFUSED:
        with pytest.raises(InputError, match=REFUSED[folder.name]):
            TextGenerator.load(folder)
        return
    generator = TextGenerator.load(folder, device="cpu", dtype="fp32")
    assert generator.tokenizer.encode_prompt(expected["text"], allow_special=True) == expected["ids"]
    [[completion]] = generator.generate(PROMPT, max_new_tokens=24, temperature=0)
    ended = completion.finish_reason == "stop"
    assert completion.ids == expected["greedy"][: len(expected["greedy"]) - ended]
    assert ended == (expected["greedy"][-1] in generator.tokenizer.stops)


if __name__ == "__main__":
    write_all(Path(sys.argv[1]))
