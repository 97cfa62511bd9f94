"""Peak speeds: the table of GPUs and the measurement."""

import torch

from gpt.train.cost import gpu_peak, peak_flops

PEAKS = {  # what torch calls a GPU, and dense bf16/fp16 TFLOP/s by its maker; 0: not in our table
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA L4": 121,
    "NVIDIA L40S": 362,
    "NVIDIA A10": 125,
    "Tesla T4": 65,
    "Tesla V100-SXM2-16GB": 125,
    "NVIDIA GeForce RTX 3090": 71,
    "NVIDIA RTX A1000 Laptop GPU": 0,
    "NVIDIA A10G": 0,
    "NVIDIA L40": 0,
    "NVIDIA T400 4GB": 0,
    "NVIDIA GeForce RTX 3090 Ti": 0,
    "NVIDIA GeForce RTX 4090 Laptop GPU": 0,
    "NVIDIA GeForce RTX 4090 D": 0,
    "NVIDIA GeForce RTX 5090 D": 0,
}


def test_a_gpus_peak_is_found_by_whole_words_of_its_name():
    assert {name: gpu_peak(name) / 1e12 for name in PEAKS} == PEAKS


def test_the_measured_peak_is_about_what_a_large_product_reaches():
    assert peak_flops(torch.device("cpu"), torch.float32) > 1e7
    assert peak_flops(torch.device("cpu"), torch.float16) > 1e5
