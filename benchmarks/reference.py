"""The model that greedy texts are compared with: our own, without a cache."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Agreement:
    """How far greedy texts agree with the choices of the reference after the same tokens."""

    equal: float
    """share of tokens that are the reference's first choice"""
    deficit: float
    """largest distance of a chosen token's reference logit below the maximum"""
    spread: float
    """standard deviation of the reference's logits"""

    def fine(self, exact: bool) -> bool:
        """Returns whether the texts come from the same model: up to the rounding of fp32 if `exact`, else up to that of
        a shorter precision."""
        return self.deficit <= (1e-3 if exact else self.spread / 4)


class Reference:
    """The model of `folder` in fp32."""

    def __init__(self, folder: Path, device: str):
        from gpt.checkpoint.weights import load_model, open_folder

        self.model = load_model(open_folder(folder)).to(device).eval()

    def agreement(self, prompts: list[list[int]], texts: list[list[int]]) -> Agreement:
        """Returns the Agreement of `texts`, each a greedy continuation of its prompt. All prompts have one length, all
        texts too."""
        import torch

        logits = all_logits(self.model, [prompt + text[:-1] for prompt, text in zip(prompts, texts, strict=True)])
        logits = logits[:, len(prompts[0]) - 1 :]  # (R, T, V), T new tokens
        chosen = logits.gather(-1, torch.tensor(texts, device=logits.device)[..., None])[..., 0]  # (R, T)
        deficits = logits.amax(-1) - chosen
        return Agreement((deficits == 0).float().mean().item(), deficits.max().item(), logits.std().item())


def all_logits(model: Any, rows: list[list[int]]) -> Any:
    """Returns the logits (R, T, V), in fp32, of a GPT at every position of `rows` (R, T)."""
    import torch

    with torch.inference_mode():
        return model.head(model.hidden(torch.tensor(rows, device=model.device)))
