"""For tests of LoRA adapters: the files that PEFT writes, and the model with an adapter that is not merged."""

import torch
from checkpoint_helpers import load_theirs
from foreign_helpers import write
from safetensors.torch import save_file

MODULES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
SIZES = {"attn.c_attn": (32, 96), "attn.c_proj": (32, 32), "mlp.c_fc": (32, 128), "mlp.c_proj": (128, 32)}
SETTINGS = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "lora_alpha": 12, "r": 4, "init_lora_weights": True}


def save_adapter(folder, base, modules=MODULES, rank=4, whole=None, pickled=False, **settings):
    """Writes an adapter for the model in the folder `base` with the names that PEFT gives. Returns its tensors."""
    torch.manual_seed(9)
    tensors = {}
    for layer in range(2):
        for module in modules:
            name = f"base_model.model.transformer.h.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, SIZES[module][0]) * 0.2
            tensors[f"{name}.lora_B.weight"] = torch.randn(SIZES[module][1], rank) * 0.2
    tensors |= {f"base_model.model.{name}": value for name, value in (whole or {}).items()}
    write(folder, adapter_config=SETTINGS | {"base_model_name_or_path": str(base)} | settings)
    if pickled:
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return tensors


def adapted(base, tensors, scale_of):
    """Returns transformers' model of the folder `base` with the adapter beside each layer, not merged."""
    model = load_theirs(base)
    for name, a in tensors.items():
        if not name.endswith(".lora_A.weight"):
            continue
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        b, scale = tensors[name.replace("lora_A", "lora_B")], scale_of(module)

        def add(_, inputs, output, a=a, b=b, scale=scale):
            return output + scale * (inputs[0] @ a.T) @ b.T

        model.get_submodule(module).register_forward_hook(add)
    return model
