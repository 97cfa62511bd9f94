"""For tests of nanoGPT's checkpoints: its model in few lines, and the file that its train.py writes."""

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F


class LayerNorm(nn.Module):
    """Layer norm with or without a bias."""

    def __init__(self, width, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class Block(nn.Module):
    """A transformer block with nanoGPT's names."""

    def __init__(self, heads, width, bias):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = LayerNorm(width, bias), LayerNorm(width, bias)
        self.attn = nn.ModuleDict(
            {"c_attn": nn.Linear(width, 3 * width, bias=bias), "c_proj": nn.Linear(width, width, bias=bias)}
        )
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(width, 4 * width, bias=bias), "c_proj": nn.Linear(4 * width, width, bias=bias)}
        )

    def forward(self, x):
        rows, length, width = x.shape
        parts = self.attn["c_attn"](self.ln_1(x)).split(width, dim=2)
        q, k, v = (part.view(rows, length, self.heads, -1).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + self.attn["c_proj"](y)
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))  # the exact GELU


class NanoGPT(nn.Module):
    """The model of nanoGPT, with its names and its tied head."""

    def __init__(self, n_layer, n_head, n_embd, block_size, vocab_size, bias):
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, n_embd),
                "wpe": nn.Embedding(block_size, n_embd),
                "h": nn.ModuleList(Block(n_head, n_embd, bias) for _ in range(n_layer)),
                "ln_f": LayerNorm(n_embd, bias),
            }
        )
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight

    def forward(self, ids):
        """Returns the logits of all positions, (B, T, V)."""
        parts = SimpleNamespace(**self.transformer)
        x = parts.wte(ids) + parts.wpe(torch.arange(ids.shape[1]))
        for block in parts.h:
            x = block(x)
        return self.lm_head(parts.ln_f(x))


def save_nanogpt(folder, bias=True, compiled=False, **sizes):
    """Writes ckpt.pt as nanoGPT's train.py does, with the state of its optimizer; returns the NanoGPT. The weights are
    those of its initialisation, somewhat larger; gains and biases are random too."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 64, "vocab_size": 257} | sizes
    torch.manual_seed(3)
    model = NanoGPT(**sizes, bias=bias).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.03 + (parameter.dim() == 1 and name.endswith("weight")))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 2, dtype=torch.int64)).sum().backward()
    optimizer.step()
    state = {("_orig_mod." if compiled else "") + name: value for name, value in model.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = {
        "model": state,
        "optimizer": optimizer.state_dict(),
        "model_args": sizes | {"bias": bias, "dropout": 0.0},
        "iter_num": 2000,
        "best_val_loss": torch.tensor(3.2),
        "config": {"dataset": "openwebtext", "max_iters": 600_000, "learning_rate": 6e-4, "init_from": "scratch"},
    }
    torch.save(checkpoint, folder / "ckpt.pt")
    return model
