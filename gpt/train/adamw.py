"""AdamW with torch's fused kernel. torch.optim.AdamW would import the compiler, which takes a second or two.

Source: Loshchilov and Hutter 2019, arXiv:1711.05101."""

from collections import defaultdict

import torch


class AdamW:
    """The optimizer AdamW. `groups` are dicts of "params" and "weight_decay"; set "lr" before every step, to a number
    or a float32 tensor on the device. `state` holds "step", "exp_avg" and "exp_avg_sq" of each parameter."""

    def __init__(self, groups: list[dict], beta1: float, beta2: float, eps: float):
        self.param_groups = [group for group in groups if group["params"]]
        self.constant = {"beta1": beta1, "beta2": beta2, "eps": eps, "amsgrad": False, "maximize": False}
        self.state: dict[torch.Tensor, dict[str, torch.Tensor]] = defaultdict(dict)

    @torch.no_grad()
    def step(self, found_inf: torch.Tensor) -> None:
        """Updates all parameters that have a gradient, in place. If the device scalar `found_inf` is 1, nothing
        changes; the host does not wait for its value."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            states = [self.state_of(p) for p in parameters]
            means, squares, steps = ([s[name] for s in states] for name in ("exp_avg", "exp_avg_sq", "step"))
            torch._foreach_add_(steps, 1)
            torch._fused_adamw_(
                *(parameters, [p.grad for p in parameters], means, squares, [], steps),
                **(self.constant | {name: group[name] for name in ("lr", "weight_decay")}),
                grad_scale=None,
                found_inf=found_inf,
            )
            torch._foreach_sub_(steps, [found_inf] * len(steps))

    def state_of(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state

    def zero_grad(self) -> None:
        """Drops all gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
