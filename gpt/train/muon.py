"""Muon: orthogonalized steps for the matrices between embedding and head, AdamW for all other parameters.

For a matrix W with gradient G:

    M = momentum * M + (1 - momentum) * G        # running mean of the gradient
    D = momentum * M + (1 - momentum) * G        # Nesterov: one step ahead
    O = U @ V.T  where D = U @ S @ V.T           # all singular values become 1 (here: close to 1)
    W = (1 - lr * weight_decay) * W - lr * 0.2 * sqrt(longer side) * O     # as large as a step of AdamW

`orthogonalize` finds O without an SVD: five odd polynomials, one after another, push singular values towards 1.

Sources: Keller Jordan et al. 2024, kellerjordan.github.io/posts/muon; the size of the steps: Liu et al. 2025,
arXiv:2502.16982; the polynomials: Amsel et al. 2025 ("Polar Express"), arXiv:2505.16932."""

import torch
from torch import Tensor

from gpt.train.adamw import AdamW
from gpt.train.ranks import Ranks

POLYNOMIALS = (  # a x + b x^3 + c x^5; together they take singular values from 1e-3 to 1 close to 1
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
SAFETY = 1.02  # the norm becomes smaller than 1 by this factor, which leaves room for rounding
ADAMW_RMS = 0.2  # root mean square of the elements of AdamW's steps at lr 1


class MuonAdamW:
    """Muon for `matrices`, and `adamw` for other parameters; one learning rate serves both. A weight (3 C, C) holds the
    three matrices of queries, keys and values, which are orthogonalized one by one. The products run in `dtype`, and
    `ranks` share them. `param_groups`, `state` and `found_inf` are as in AdamW; the state of a matrix is "momentum"."""

    def __init__(
        self, matrices: list, adamw: AdamW, momentum: float, weight_decay: float, dtype: torch.dtype, ranks: Ranks
    ):
        self.adamw, self.momentum, self.dtype, self.ranks = adamw, momentum, dtype, ranks
        self.param_groups = [{"params": matrices, "weight_decay": weight_decay}, *adamw.param_groups]
        self.state = adamw.state

    @torch.no_grad()
    def step(self, found_inf: Tensor) -> None:
        """Updates all parameters in place, unless the device scalar `found_inf` is 1."""
        self.adamw.step(found_inf)
        group = self.param_groups[0]
        for parameter in group["params"]:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        asks = host_asks(found_inf.device)
        if asks and found_inf:
            return
        gate = 1 - found_inf  # 0 makes every update below a no-op
        lr = group["lr"] * gate  # a tensor in any case, so that a number and a tensor give the same bits
        for shape, (weights, directions) in self.by_shape(gate, asks).items():
            steps = self.ranks.spread(lambda stack: orthogonalize(stack, self.dtype), torch.stack(directions))
            size = ADAMW_RMS * max(shape) ** 0.5
            torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
            torch._foreach_add_(weights, list(steps.mul_(-lr * size).unbind()))

    def by_shape(self, gate: Tensor, finite: bool) -> dict[torch.Size, tuple[list, list]]:
        """Returns shape -> (weights, directions D) of all matrices, transposed if they have more rows than columns.
        Updates the momentum. Unless `finite`, replaces nan and infinity in the gradients by 0."""
        groups: dict[torch.Size, tuple[list, list]] = {}
        for parameter in self.param_groups[0]["params"]:
            grad = parameter.grad if finite else parameter.grad.nan_to_num(0.0, 0.0, 0.0)
            mean = self.state[parameter]["momentum"].lerp_(grad, (1 - self.momentum) * gate)
            direction = grad.lerp(mean, self.momentum)
            for weight, part in zip(square_parts(parameter), square_parts(direction), strict=True):
                if weight.shape[0] > weight.shape[1]:
                    weight, part = weight.T, part.T
                weights, directions = groups.setdefault(weight.shape, ([], []))
                weights.append(weight)
                directions.append(part)
        return groups

    def zero_grad(self) -> None:
        """Drops all gradients."""
        self.adamw.zero_grad()
        for matrix in self.param_groups[0]["params"]:
            matrix.grad = None


def host_asks(device: torch.device) -> bool:
    """Returns whether the host reads `found_inf`. Not on CUDA, where the host would have to wait for the GPU."""
    return device.type != "cuda"


def square_parts(weight: Tensor) -> tuple[Tensor, ...]:
    """Returns the three square matrices inside a weight (3 C, C), else the weight itself."""
    rows, columns = weight.shape
    return weight.split(columns) if rows == 3 * columns else (weight,)


def orthogonalize(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns U V^T for each x = U S V^T in a stack (K, rows, columns), rows <= columns, in float32: matrices whose
    singular values are all close to 1. The products run in `dtype`."""
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) * SAFETY + 1e-6)).to(dtype)
    for a, b, c in POLYNOMIALS:
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.float()
