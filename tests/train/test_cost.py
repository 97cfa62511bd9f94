"""Peak speeds: the table of GPUs and the measurement."""

from types import SimpleNamespace

import torch

from gpt.train import cost
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


def test_products_that_other_programs_hold_up_do_not_end_the_measurement(monkeypatch):
    for late in ({0}, {0, 1}, {3}, {5}):  # the products that take a second longer
        reads = iter(range(100))
        seconds = [second for i in range(50) for second in (100 * i, 100 * i + 0.001 + (i in late))]
        monkeypatch.setattr(cost, "time", SimpleNamespace(perf_counter=lambda r=reads, s=seconds: s[next(r)]))
        assert peak_flops(torch.device("cpu"), torch.float32) > 0.9 * 2 * 1024**3 / 0.001, late


def test_a_type_that_the_cpu_only_emulates_ends_the_measurement_early(monkeypatch):
    calls = []
    monkeypatch.setattr(cost, "time", SimpleNamespace(perf_counter=lambda: calls.append(0) or len(calls) * 0.1))
    assert 0 < peak_flops(torch.device("cpu"), torch.float32) <= 2 * 256**3 / 0.1
    assert len(calls) <= 8  # a clock read before and after each product
