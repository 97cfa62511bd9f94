"""Products in 8-bit floating point: twice bf16's speed on GPUs that have them (compute capability 8.9 and above).

Source: Micikevicius et al. 2022, arXiv:2209.05433.

Shapes: N rows, K inputs, M outputs."""

import torch

FORMAT = torch.float8_e4m3fn  # 3 bits after the point, up to 448
CAPABILITY = (8, 9)
MULTIPLE = 16  # K and M must be multiples of it


def fp8_linear(x, weight):
    """x (N, K) @ weight (M, K).T -> (N, M) in their type, bf16; sums are in float32. No gradient comes back."""
    (x8, x_scale), (weight8, weight_scale) = rounded(x), rounded(weight)
    scales = {"scale_a": x_scale, "scale_b": weight_scale}
    return torch._scaled_mm(x8, weight8.T, **scales, out_dtype=x.dtype, use_fast_accum=True)


def rounded(x):
    """(values in FORMAT, scale): x is about their product. One scale for all of x, so that the largest value just fits;
    the host does not wait to know it. Where x is not finite some value is nan."""
    scale = (x.abs().amax().float() / torch.finfo(FORMAT).max).clamp(min=torch.finfo(torch.float32).tiny)
    return (x / scale).to(FORMAT), scale
