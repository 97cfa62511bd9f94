"""Runs in an environment with another transformers: reads folders of this program as other programs do.

`python other_programs.py REQUEST` writes what comes out to answers.json in "dir". REQUEST is a JSON file with "folders"
(name -> path), "texts", "conversations" and "dir"."""

import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline


def read(folder, texts):
    """Returns what transformers makes of a folder and texts: the model's inputs, logits, greedy text."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    inputs = tokenizer(texts[0], return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
    made = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs.input_ids.shape[1] :]
    batch = tokenizer(texts, padding=True)
    written = pipeline("text-generation", model=folder)(
        texts[0], max_new_tokens=12, do_sample=False, clean_up_tokenization_spaces=False
    )
    return {
        "names": sorted(inputs),
        "ids": [tokenizer(text).input_ids for text in texts],
        "masked": [sum(mask) for mask in batch["attention_mask"]],
        "with_eos": tokenizer(texts[0] + tokenizer.eos_token).input_ids,
        "logits": logits.tolist(),
        "greedy": made.tolist(),
        "pipeline": written[0]["generated_text"],
    }


def train_with_trl(folder, texts, out):
    """Returns the ids that TRL trains on: prompts with completions, to which it adds the end of text."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [{"prompt": text, "completion": " yes"} for text in texts]
    settings = {"output_dir": str(out), "max_steps": 1, "report_to": [], "use_cpu": True, "max_length": None}
    arguments = SFTConfig(per_device_train_batch_size=2, bf16=False, gradient_checkpointing=False, **settings)
    trainer = SFTTrainer(folder, args=arguments, train_dataset=Dataset.from_list(rows))
    ids = [row["input_ids"] for row in trainer.train_dataset]
    return {"trl": [list(map(int, row)) for row in ids], "loss": trainer.train().training_loss}


def add_adapter(folder, out):
    """Adds an adapter of peft and saves it; reads it and saves the merged model. Returns both paths."""
    from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder), LoraConfig(fan_in_fan_out=True, target_modules=["c_attn"])
    )
    model.save_pretrained(out / "adapter")
    merged = AutoPeftModelForCausalLM.from_pretrained(str(out / "adapter")).merge_and_unload()
    merged.save_pretrained(out / "merged")
    AutoTokenizer.from_pretrained(folder).save_pretrained(out / "merged")
    return {"merged": str(out / "merged"), "adapter": str(out / "adapter")}


def main():
    transformers.utils.logging.set_verbosity_error()
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    answers = {"version": transformers.__version__}
    for name, folder in request["folders"].items():
        out = Path(request["dir"]) / name
        tokenizer = AutoTokenizer.from_pretrained(folder)
        chats = [tokenizer.apply_chat_template(chat, return_dict=False) for chat in request["conversations"]]
        answers[name] = (
            {"chats": chats} | read(folder, request["texts"]) | train_with_trl(folder, request["texts"], out)
        )
        answers[name] |= add_adapter(folder, out)
    Path(request["dir"], "answers.json").write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main()
