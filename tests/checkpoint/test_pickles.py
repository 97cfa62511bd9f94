"""Files of torch.save: read as torch reads them; what would run code or claims too much is refused before it costs
anything."""

import io
import json
import os
import pickle
import random
import subprocess
import sys
import zipfile
from collections import OrderedDict

import pytest
import torch
from checkpoint_helpers import Canary
from paths import ROOT
from torch.torch_version import TorchVersion

from gpt.checkpoint.pickles import PICKLE_LIMIT, read_pickle
from gpt.errors import InputError, IntegrityError, ResourceError

VALUES = {"model": {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(5, dtype=torch.float16)}, "steps": 600_000}
FORMATS = {"archive": True, "older format": False}


@pytest.mark.parametrize("format", FORMATS)
def test_tensors_and_plain_values_are_read_as_they_were_saved(format, tmp_path):
    values = VALUES if FORMATS[format] else VALUES["model"]  # the older format has no number above its size
    torch.save(values, tmp_path / "x.pt", _use_new_zipfile_serialization=FORMATS[format])
    read = read_pickle(tmp_path / "x.pt")
    tensors = read["model"] if FORMATS[format] else read
    assert all(torch.equal(tensors[name], value) for name, value in VALUES["model"].items())
    assert read.get("steps", 600_000) == 600_000


def test_tied_parameters_and_views_are_read(tmp_path):
    weight = torch.nn.Parameter(torch.randn(40, 3))
    torch.save(OrderedDict(wte=weight, head=weight, row=weight.detach()[7], turned=weight.detach().t()), tmp_path / "x")
    read = read_pickle(tmp_path / "x")
    assert read["wte"].data_ptr() == read["head"].data_ptr()
    assert torch.equal(read["row"], weight[7])
    assert torch.equal(read["turned"], weight.t())


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="only Linux tells what is mapped")
def test_an_archive_is_mapped_into_memory(tmp_path):
    torch.save(VALUES, tmp_path / "x.pt")
    values = read_pickle(tmp_path / "x.pt")
    with open("/proc/self/maps") as maps:
        assert str(tmp_path / "x.pt") in maps.read()
    del values


# ---- hostile files


@pytest.fixture
def canary(tmp_path):
    """A Canary, which must not have sung at the end; then it does, so it would have."""
    canary = Canary(tmp_path / "canary")
    yield canary
    assert not (tmp_path / "canary").exists()
    pickle.loads(pickle.dumps(canary)).close()
    assert (tmp_path / "canary").exists()


def refusal(path):
    """Returns the line that refuses a file."""
    with pytest.raises(IntegrityError) as caught:
        read_pickle(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    assert "\n" not in line
    assert "weights_only" not in line  # torch's own message says how to run the payload
    return line


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("place", ["alone", "beside", "within"])
def test_fault_103_a_pickle_that_calls_a_function_is_refused_with_its_name(format, place, canary, tmp_path):
    values = {"alone": canary, "beside": VALUES["model"] | {"x": canary}, "within": {"model": {"a": [(canary,)]}}}[
        place
    ]
    torch.save(values, tmp_path / "x.pt", _use_new_zipfile_serialization=FORMATS[format])
    assert "its pickle wants to call io.open, which is not run" in refusal(tmp_path / "x.pt").replace("_io", "io")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_fault_103_a_plain_pickle_of_any_protocol_is_not_run(protocol, canary, tmp_path):
    (tmp_path / "x.pt").write_bytes(pickle.dumps(canary, protocol))
    refusal(tmp_path / "x.pt")
    write_archive(tmp_path / "y.pt", pickle.dumps({"a": canary}, protocol))
    refusal(tmp_path / "y.pt")


def write_archive(path, pickled, data=b"1234", compress=(), more=()):
    """Writes an archive as torch.save does, of any pickle. `compress`: names to compress; `more`: (name, content)."""
    entries = [("data.pkl", pickled), ("byteorder", b"little"), ("version", b"3\n"), ("data/0", data), *more]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries:
            kind = zipfile.ZIP_DEFLATED if name in compress else zipfile.ZIP_STORED
            archive.writestr(f"x/{name}", content, kind)


def write_older(path, pickled, data=b"1234"):
    """Writes a file of torch before 1.6."""
    head = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    keys = pickle.dumps(["0"], 2)
    path.write_bytes(b"".join(head) + pickled + keys + (len(data) // 4).to_bytes(8, "little") + data)


class Claim:
    """A tensor in a pickle: `shape` and `stride` of a storage of `numel` numbers, whether they are there or not."""

    def __init__(self, numel, shape, stride, older=False):
        self.numel, self.shape, self.stride, self.older = numel, shape, stride, older

    def __reduce__(self):
        arguments = (Storage(self.numel, self.older), 0, self.shape, self.stride, False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments


class Storage:
    def __init__(self, numel, older):
        self.id = ("storage", torch.FloatStorage, "0", "cpu", numel) + ((None,) if older else ())


class ClaimPickler(pickle.Pickler):
    def persistent_id(self, value):
        return value.id if isinstance(value, Storage) else None


def pickled_claims(*claims):
    file = io.BytesIO()
    ClaimPickler(file, 2).dump({f"t{number}": claim for number, claim in enumerate(claims)})
    return file.getvalue()


CLAIMS = {  # numel, shape, stride
    "a storage beyond the file": [(10**12, (10**12,), (1,))],
    "a storage of 2^61 numbers": [(1 << 61, (1 << 61,), (1,))],
    "a shape beyond its storage": [(1, (10**5, 10**5), (10**5, 1))],
    "one number as many": [(1, (10**5, 10**5), (0, 0))],
    "many tensors in one place": [(1000, (1000,), (1,))] * 1_000,
    "less than nothing": [(-5, (1,), (1,))],
    "a view beyond its storage": [(1, (1,), (1,)), (1, (2,), (1,))],
}


def test_the_files_of_these_tests_are_read_where_their_claims_are_true(tmp_path):
    write_archive(tmp_path / "x.pt", pickled_claims(Claim(1, (1,), (1,)), Claim(1, (1, 1), (1, 1))))
    write_older(tmp_path / "y.pt", pickled_claims(Claim(1, (1,), (1,), True)))
    for name in ("x.pt", "y.pt"):
        assert read_pickle(tmp_path / name)["t0"].view(torch.uint8).tolist() == list(b"1234")


def write_hostile(folder):
    """Writes all hostile files to a folder."""
    for name, claims in CLAIMS.items():
        write_archive(folder / f"{name}.pt", pickled_claims(*(Claim(*claim) for claim in claims)), bytes(4000))
        if len(claims) == 1:
            write_older(folder / f"{name} (older).pt", pickled_claims(*(Claim(*claim, True) for claim in claims)))
    good = pickled_claims(Claim(1, (1,), (1,)))
    write_archive(folder / "a compressed pickle.pt", good + b" " * 400_000, compress=["data.pkl"])
    write_archive(folder / "compressed data.pt", good, bytes(30_000_000), compress=["data/0"])
    write_archive(folder / "a compressed version.pt", good, more=[("x", bytes(10**7))], compress=["x"])
    write_archive(folder / "a long pickle.pt", b"}" * (PICKLE_LIMIT + 1))
    write_archive(folder / "empty dictionaries.pt", b"\x80\x02" + b"}" * 100_000 + b".")
    write_older(folder / "a long pickle (older).pt", b"X" + PICKLE_LIMIT.to_bytes(4, "little") + bytes(PICKLE_LIMIT))
    write_older(folder / "a huge text (older).pt", b"X" + (1 << 31).to_bytes(4, "little") + b".")


def test_fault_106_files_that_claim_more_than_they_hold_are_refused(tmp_path):
    write_hostile(tmp_path)
    for path in sorted(tmp_path.glob("*.pt")):
        if path.name != "empty dictionaries.pt":  # no tensors, but harmless
            refusal(path)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count the peak of memory in other units")
def test_fault_106_and_they_take_little_memory(tmp_path):
    write_hostile(tmp_path)
    code = "from test_pickles import read_all; read_all()"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests/checkpoint")))
    }
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files, before, after = json.loads(done.stdout)
    assert files > 15
    assert after - before < 250_000  # KB


def read_all():
    """Reads all files here that end in .pt; prints how many, and the peak memory before and after."""
    import resource
    from pathlib import Path

    files, before = sorted(Path().glob("*.pt")), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for path in files:
        try:
            read_pickle(path)
        except IntegrityError:
            continue
    print(json.dumps([len(files), before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))


@pytest.mark.parametrize("change", [lambda b: b"x" + b, lambda b: b + b"x", lambda b: b + b, lambda b: b[:-1]])
def test_fault_106_an_archive_that_other_programs_would_read_differently_is_refused(change, tmp_path):
    torch.save(VALUES, tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes(change((tmp_path / "x.pt").read_bytes()))
    refusal(tmp_path / "x.pt")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"a text", b"\x80\x02", b"PK\x05\x06" + bytes(18)])
def test_what_is_no_file_of_torch_save_is_refused(content, tmp_path):
    (tmp_path / "x.pt").write_bytes(content)
    assert "not a file of tensors as torch.save writes it" in refusal(tmp_path / "x.pt")


def test_fault_104_a_torch_that_reads_pickles_unsafely_is_refused(canary, tmp_path, monkeypatch):
    torch.save(canary, tmp_path / "x.pt")
    for old in ("2.5.1", "2.9.1+cpu"):
        monkeypatch.setattr(torch, "__version__", TorchVersion(old))
        with pytest.raises(ResourceError, match=r"reads pickles unsafely; update to 2\.10"):
            read_pickle(tmp_path / "x.pt")


def test_a_missing_file_and_a_git_lfs_pointer_are_named(tmp_path):
    with pytest.raises(IntegrityError, match=r"x\.pt: missing"):
        read_pickle(tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    with pytest.raises(InputError, match="git-lfs's pointer"):
        read_pickle(tmp_path / "x.pt")


@pytest.mark.parametrize("format", FORMATS)
def test_fault_103_damaged_files_are_read_or_refused(format, tmp_path):
    torch.save(VALUES["model"], tmp_path / "x.pt", _use_new_zipfile_serialization=FORMATS[format])
    content, choose, read = (tmp_path / "x.pt").read_bytes(), random.Random(0), 0
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(choose.randint(1, 3)):
            damaged[choose.randrange(len(damaged))] = choose.randrange(256)
        (tmp_path / "x.pt").write_bytes(damaged[: choose.choice([len(damaged), choose.randrange(len(damaged))])])
        try:
            read_pickle(tmp_path / "x.pt")
            read += 1
        except IntegrityError:
            continue
    assert 0 < read < 300
