"""The ctypes structures against the C++ structs that they mirror."""

import re

import pytest
import torch

from gpt.kernels import native_attention, native_gelu, native_model, native_sampler
from gpt.kernels.build import FOLDER
from gpt.kernels.structures import address

MIRRORS = [
    ("attention.cpp", native_attention.Attention),
    ("gelu.cpp", native_gelu.Gelu),
    ("sampler.cpp", native_sampler.Choice),
    ("products.h", native_model.Matrix),
    *(("model.cpp", getattr(native_model, name)) for name in ("Layer", "Model", "Cache", "Batch")),
]


@pytest.mark.parametrize(("file", "mirror"), MIRRORS, ids=lambda value: getattr(value, "__name__", value))
def test_a_structure_has_the_fields_of_the_struct_in_their_order(file, mirror):
    source = re.sub(r"//.*", "", (FOLDER / file).read_text())
    body = re.search(rf"struct {mirror.__name__} \{{(.*?)\}}", source, re.DOTALL)[1]
    declared = re.findall(r"(\w+)(?=[,;])", body)
    assert [name for name, _ in mirror._fields_] == declared


def test_no_tensor_is_a_null_pointer():
    tensor = torch.zeros(3)
    assert address(None) is None and address(tensor[1:]) == tensor.data_ptr() + 4
