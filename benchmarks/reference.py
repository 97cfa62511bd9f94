"""What a program's greedy texts are checked against: our own model in fp32, without a cache."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Agreement:
    """How greedy texts compare with what the reference chooses after the same tokens."""

    equal: float
    """share of tokens that are the reference's first choice"""
    deficit: float
    """largest distance of a chosen token's reference logit below the maximum"""
    spread: float
    """standard deviation of the reference's logits"""

    def fine(self, exact):
        """Whether this is the same model: up to fp32's rounding if `exact`, else up to a coarser precision's."""
        return self.deficit <= (1e-3 if exact else self.spread / 4)


class Reference:
    def __init__(self, folder, device):
        import torch

        from gpt.interop import load_model

        self.torch, self.model = torch, load_model(folder).to(device)

    def agreement(self, prompts, texts):
        """The Agreement of `texts`, lists of ids, each a greedy continuation of its prompt."""
        torch, model, states = self.torch, self.model, []
        rows = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
        ids = torch.tensor(rows, device=model.token.weight.device)
        watch = model.ln_f.register_forward_hook(lambda _module, _inputs, output: states.append(output))
        with torch.inference_mode():
            model(ids, ids)  # with targets, every position reaches ln_f
            logits = model.head(states[0][:, len(prompts[0]) - 1 : -1])  # (R, T, V)
        watch.remove()
        chosen = logits.gather(-1, ids[:, len(prompts[0]) :, None])[..., 0]  # (R, T)
        deficits = logits.amax(-1) - chosen
        return Agreement((deficits == 0).float().mean().item(), deficits.max().item(), logits.std().item())
