"""Muon: steps of equal size in every direction for the matrices between embedding and head, AdamW for all else.

Source: Keller Jordan et al. 2024, kellerjordan.github.io/posts/muon; the scale of its steps: Liu et al. 2025,
arXiv:2502.16982; the polynomials: Amsel et al. 2025 ("Polar Express"), arXiv:2505.16932."""

import torch

POLYNOMIALS = (  # a x + b x^3 + c x^5, one after another, take singular values from 1e-3 to 1 near to 1
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
SAFETY = 1.02  # the norm is made smaller than 1 by it, for what rounding adds
ADAMW_RMS = 0.2  # root mean square of the elements of AdamW's steps, at lr 1


class MuonAdamW:
    """Muon for `matrices`, and `adamw`, an AdamW, for other parameters; one lr serves both. A weight (3 C, C) holds
    three matrices, of queries, keys and values, that are made orthogonal one by one. `dtype` is of the products in
    there, which `ranks` share. Groups, state and gate as in AdamW; of a matrix `state` holds "momentum"."""

    def __init__(self, matrices, adamw, momentum, weight_decay, dtype, ranks):
        self.adamw, self.momentum, self.dtype, self.ranks = adamw, momentum, dtype, ranks
        self.param_groups = [{"params": matrices, "weight_decay": weight_decay}, *adamw.param_groups]
        self.state = adamw.state
        self.found_inf = None

    @torch.no_grad()
    def step(self):
        self.adamw.found_inf = self.found_inf
        self.adamw.step()
        group = self.param_groups[0]
        for parameter in group["params"]:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        waits = host_waits(self.found_inf.device)
        if waits and self.found_inf:
            return
        goes = 1 - self.found_inf
        lr = group["lr"] * goes  # a tensor either way: the same bits from a number as from a tensor of it
        shares = {}  # shape -> [(part of a weight, its direction)]
        for parameter in group["params"]:
            grad = parameter.grad if waits else parameter.grad.nan_to_num(0.0, 0.0, 0.0)
            direction = self.direction(parameter, grad, goes)
            for part, its in zip(parts(parameter), parts(direction), strict=True):
                wide, its = (part, its) if part.shape[0] <= part.shape[1] else (part.T, its.T)
                shares.setdefault(wide.shape, []).append((wide, its))
        for shape, pairs in shares.items():
            directions = torch.stack([its for _, its in pairs])
            steps = self.ranks.spread(lambda some: orthogonalize(some, self.dtype), directions)
            weights, size = [part for part, _ in pairs], ADAMW_RMS * max(shape) ** 0.5
            torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
            torch._foreach_add_(weights, list(steps.mul_(-lr * size).unbind()))

    def zero_grad(self):
        self.adamw.zero_grad()
        for matrix in self.param_groups[0]["params"]:
            matrix.grad = None

    def direction(self, parameter, grad, goes):
        """The gradient, half-way looked ahead: Nesterov's momentum."""
        mean = self.state[parameter]["momentum"].lerp_(grad, (1 - self.momentum) * goes)
        return grad.lerp(mean, self.momentum)


def host_waits(device):
    """Whether the host asks if the gradients are finite; a GPU it would keep waiting for the next kernels."""
    return device.type != "cuda"


def parts(weight):
    """A weight (N, C) as the square matrices that lie in it side by side, else as the one it is."""
    rows, columns = weight.shape
    return weight.split(columns) if rows == 3 * columns else [weight]


def orthogonalize(x, dtype):
    """The nearest matrices with orthonormal rows, roughly: all singular values of x (K, rows, columns), where rows are
    at most as many as columns, come near to 1. Computed in `dtype`; float32."""
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) * SAFETY + 1e-6)).to(dtype)
    for a, b, c in POLYNOMIALS:
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.float()
