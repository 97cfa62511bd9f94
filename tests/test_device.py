"""Devices by name, limits of memory, and tensors side by side in large pages."""

import mmap

import pytest
import torch

from gpt import device
from gpt.device import ALIGNMENT, empty_together, free_memory, lie_together, pick_device, total_memory
from gpt.errors import InputError

CPU = torch.device("cpu")


def test_the_cpu_always_exists_and_auto_finds_a_device():
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type in ("cpu", "cuda", "mps")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta", "xpu:7", "", "cuda:-2", "cpu:1", "mps:1"])
def test_a_device_that_does_not_exist_is_refused_by_name(name):
    with pytest.raises(InputError, match=r"^device .*use (auto|--device auto)") as caught:
        pick_device(name)
    assert name in str(caught.value)


def test_a_gpu_that_the_driver_shows_and_torch_cannot_use_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"device cuda: this torch .* finds none; use --device auto"):
        pick_device("cuda")


@pytest.mark.parametrize(("cuda", "driver", "warnings"), [(None, True, 1), (None, False, 0), ("13.0", True, 0)])
def test_a_cpu_build_of_torch_beside_an_nvidia_driver_is_a_warning(monkeypatch, capsys, cuda, driver, warnings):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(device.os.path, "exists", lambda path: driver and path == "/proc/driver/nvidia/version")
    pick_device("auto")
    assert capsys.readouterr().err.count("CPU build; see README, Install") == warnings


# ---- memory


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Returns a function that simulates control groups: text of /proc/self/cgroup, file below the root -> its text."""

    def pretend(own, files):
        (tmp_path / "own").write_text(own)
        for name, text in files.items():
            path = tmp_path / "root" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    monkeypatch.setattr(device, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(device, "GROUP_ROOT", tmp_path / "root")
    return pretend


STAT = "anon 5\ninactive_file 30\nactive_file 7\n"


def test_in_a_container_its_limit_counts_and_dropped_page_cache_does_not(groups):
    files = {"memory.max": "1000\n", "memory.current": "400\n", "memory.stat": STAT}
    groups("0::/\n", files)
    assert total_memory(CPU) == 1000
    assert free_memory(CPU) == 1000 - 400 + 30


def test_the_tightest_of_nested_groups_counts(groups):
    files = {"memory.stat": STAT, "job/memory.max": "500", "job/memory.current": "100", "job/memory.stat": STAT}
    files |= {"job/step/memory.max": "max", "job/step/memory.current": "90", "job/step/memory.stat": STAT}
    groups("1:name=systemd:/x\n0::/job/step\n", files)
    assert (total_memory(CPU), free_memory(CPU)) == (500, 430)


def test_the_first_version_of_control_groups_counts_too(groups):
    files = {"memory/memory.limit_in_bytes": "700", "memory/memory.usage_in_bytes": "200"}
    files["memory/memory.stat"] = STAT + "total_inactive_file 50\n"
    groups("4:memory:/docker/abc\n1:cpu:/\n0::/\n", files)  # as seen inside: its own group is the root
    assert (total_memory(CPU), free_memory(CPU)) == (700, 550)


def test_without_a_limit_it_is_the_machine_that_counts(groups, tmp_path):
    whole = total_memory(CPU)
    groups("0::/\n", {"memory.max": "max\n", "memory.current": "4\n", "memory.stat": STAT})
    assert total_memory(CPU) == whole > free_memory(CPU) > 1 << 20
    (tmp_path / "own").unlink()
    assert total_memory(CPU) == whole


# ---- large pages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_tensors_lie_together_and_do_not_overlap(dtype):
    shapes = [(3, 5), (1,), (0, 4), (1000, 1001), (2, 2, 2)]
    tensors = empty_together(shapes, dtype)
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % ALIGNMENT == 0 or not tensor.numel()
    assert [tuple(tensor.shape) for tensor in tensors] == shapes
    assert all((tensor == number).all() for number, tensor in enumerate(tensors))
    assert lie_together(tensors)
    assert not lie_together([tensors[0], torch.zeros(2)])


@pytest.mark.parametrize("missing", ["MADV_HUGEPAGE", "MAP_ANONYMOUS"])
def test_a_system_without_such_pages_gets_none(monkeypatch, missing):
    monkeypatch.delattr(mmap, missing)
    assert empty_together([(3, 5), (7,)], torch.float32) is None


def test_a_system_that_refuses_them_gets_none(monkeypatch):
    def refuse(*_, **__):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", refuse)
    assert empty_together([(3, 5), (7,)], torch.int8) is None


@pytest.mark.parametrize(("cc", "known", "expected"), [("", (), False), ("", ("clang",), True), ("icx", (), True)])
def test_fault_132_a_c_compiler_is_looked_for_as_triton_does(monkeypatch, cc, known, expected):
    monkeypatch.setenv("CC", cc)
    monkeypatch.setattr(device.shutil, "which", lambda name: name if name in known else None)
    assert device.has_compiler() is expected
