"""For tests of the model: small models with random weights, random ids."""

import torch

from gpt.model import GPT, ModelConfig

SMALL = ModelConfig(n_layer=2, n_head=4, n_embd=32, block_size=24)
VOCABULARY = 131  # odd, so that the embedding is padded


def random_model(config=SMALL, vocabulary=VOCABULARY, seed=0, spread=5.0):
    """Returns a model whose weights are large enough that attention and activations matter."""
    torch.manual_seed(seed)
    model = GPT(config, vocabulary).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or ".ln" in name or name.startswith("ln"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.mul_(spread)
    return model


def random_ids(*shape, seed=1, vocabulary=VOCABULARY):
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))
