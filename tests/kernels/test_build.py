"""The build of the native libraries: one at a time, no verdict from a build that was cut short, nothing left over."""

import errno
import itertools
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from paths import ROOT

from gpt.files import lock_file, make_private
from gpt.kernels import build
from gpt.kernels.measure import cpu_identity

pytestmark = pytest.mark.skipif(os.name == "nt", reason="nothing is built on Windows")
WORKS = 'cp "$LIBRARY" "$TARGET"'
HOUR = 3600


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The path of a cache folder that does not exist yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "gpt-text-generator"


class Compiler:
    """A shell script in place of the compiler. In the script, $TARGET is the file to write and $LIBRARY a library that
    works; `calls` are the arguments of each call so far."""

    def __init__(self, folder, library):
        self.path, self.log, self.library = folder / "compiler", folder / "calls", library

    def __call__(self, script):
        head = f'for TARGET; do :; done\nLIBRARY="{self.library}"\necho "$*" >> "{self.log}"'
        self.path.write_text(f"#!/bin/sh\n{head}\n{script}\n")
        self.path.chmod(0o755)

    @property
    def calls(self):
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def compiler(tmp_path, monkeypatch, kernels_cache, cache):
    with monkeypatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", kernels_cache)
        library = build.library_path()
    compiler = Compiler(tmp_path, library)
    monkeypatch.setenv("CXX", str(compiler.path))
    compiler(WORKS)
    return compiler


def names(folder):
    return {path.name for path in folder.iterdir()}


def all_that_a_build_leaves():
    return {build.library_path().name, "generation.lock"}


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "this takes too long"
        time.sleep(0.02)


def is_locked(cache):
    with open(cache / "generation.lock", "ab") as file:
        return not lock_file(file)


# ---- one build at a time


def test_fault_117_the_cache_folder_is_private_and_holds_nothing_but_the_library_and_the_lock(compiler, cache):
    mask = os.umask(0)
    try:
        assert build.load_library() is None
        assert build.build_now() is not None
    finally:
        os.umask(mask)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert names(cache) == all_that_a_build_leaves()
    assert [path.stat().st_mode & 0o022 for path in cache.iterdir()] == [0, 0]
    assert build.load_library() is not None


START_FIFTY = """
import os
from gpt.kernels import build
children = []
for _ in range(50):
    child = os.fork()
    if child == 0:
        os._exit(build.start_background_build())
    children.append(child)
print(sum(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


def test_fault_118_fifty_programs_at_once_start_one_build(compiler, cache):
    run = subprocess.run([sys.executable, "-c", START_FIFTY], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "1\n"
    wait_until(lambda: build.load_library() and not is_locked(cache))
    assert len(compiler.calls) == 1
    assert names(cache) == all_that_a_build_leaves()


def test_fault_118_long_jobs_that_need_the_library_at_once_wait_for_one_build(compiler, cache):
    compiler(f"sleep 0.3; {WORKS}")
    with ThreadPoolExecutor(8) as pool:
        libraries = list(pool.map(lambda _: build.build_now(), range(8)))
    assert all(library.gpt_forward for library in libraries)
    assert len(compiler.calls) == 1
    assert names(cache) == all_that_a_build_leaves()


def test_fault_118_while_another_program_builds_no_process_is_started(compiler, cache, monkeypatch):
    make_private(cache)
    with open(cache / "generation.lock", "ab") as lock:
        assert lock_file(lock)
        monkeypatch.setattr(subprocess, "Popen", None)
        assert not build.start_background_build()
    assert compiler.calls == []


def test_fault_118_the_two_libraries_do_not_wait_for_each_other(compiler, cache):
    make_private(cache)
    with open(cache / "training.lock", "ab") as lock:
        assert lock_file(lock)
        assert build.build_now() is not None


def test_a_background_build_outlives_the_process_that_started_it(compiler):
    compiler(f"sleep 1; {WORKS}")
    code = "import sys; from gpt.kernels import build; assert build.start_background_build()"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"], check=True, cwd=ROOT)
    assert build.load_library() is None
    wait_until(build.load_library)


def test_a_background_build_has_a_low_priority_but_not_the_lowest(compiler, tmp_path):
    compiler(f'nice >> "{tmp_path}/niceness"; {WORKS}')
    assert build.start_background_build()
    wait_until(build.load_library)
    own = os.nice(0)
    assert set((tmp_path / "niceness").read_text().split()) == {str(min(own + 10, 19))}


def test_a_file_system_without_locks_gets_its_library_and_nothing_is_swept_there(compiler, cache, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    (cache / "building-generation-x").mkdir(parents=True)
    cache.chmod(0o700)
    monkeypatch.setattr("fcntl.flock", fail)
    assert build.build_now() is not None
    assert names(cache) == all_that_a_build_leaves() | {"building-generation-x"}


def test_fault_117_a_lock_that_is_a_link_is_not_opened(compiler, cache, tmp_path):
    make_private(cache)
    (tmp_path / "target").write_text("mine")
    (cache / "generation.lock").symlink_to(tmp_path / "target")
    assert build.build_now() is None and not build.start_background_build()
    assert compiler.calls == []


# ---- builds that were cut short


@pytest.mark.parametrize("alone", [True, False], ids=["its compiler goes on", "its compiler too"])
def test_fault_119_a_build_that_was_killed_is_done_again_and_its_leftovers_are_swept(compiler, cache, tmp_path, alone):
    compiler(f'mkdir "{tmp_path}/first" 2>/dev/null && exec sleep 600; {WORKS}')
    builder = build.start_builder(build.GENERATION)
    wait_until((tmp_path / "first").exists)
    (os.kill if alone else os.killpg)(builder.pid, signal.SIGKILL)
    builder.wait()
    assert any(name.startswith("building-") for name in names(cache))
    if alone:  # the lock is the compiler's now
        assert not build.start_background_build()
        os.killpg(builder.pid, signal.SIGKILL)
    wait_until(lambda: not is_locked(cache))
    assert build.build_now() is not None
    assert names(cache) == all_that_a_build_leaves()


@pytest.mark.parametrize(
    "end",
    [
        "kill -9 $$",
        "exit 137",
        'echo "c++: fatal error: Killed signal terminated program cc1plus" >&2; exit 1',
        'echo "collect2: fatal error: ld terminated with signal 7 [Bus error]" >&2; exit 1',
        'echo "clang: error: unable to execute command: Killed" >&2; exit 254',
        'echo "virtual memory exhausted: Cannot allocate memory" >&2; exit 1',
        'echo "/tmp/cc.s: error writing: No space left on device" >&2; exit 1',
        'echo "Fatal error: x.o: Disk quota exceeded"; exit 1',
    ],
)
def test_fault_119_a_compiler_that_was_cut_short_is_no_verdict(compiler, cache, end):
    compiler(end)
    assert build.build_now() is None
    assert names(cache) == {"generation.lock"}
    assert len(compiler.calls) == 1  # no weaker flags
    compiler(WORKS)
    assert build.build_now() is not None
    assert "-march=native" in compiler.calls[-1]


def test_fault_119_a_compiler_that_cannot_be_started_is_no_verdict(compiler, cache):
    compiler.path.write_text("#!/no/such/shell\n")
    assert build.build_now() is None
    assert names(cache) == {"generation.lock"}


def test_fault_119_a_build_that_takes_too_long_is_killed_with_its_compilers(compiler, cache):
    compiler("exec sleep 600")
    make_private(cache)
    arguments = f"{str(build.library_path())!r}, 'generation'"
    code = f"from gpt.kernels import build; build.BUILD_SECONDS = 1; build.run_builder({arguments})"
    with open(cache / "generation.lock", "ab") as lock:
        assert lock_file(lock)
        command = [sys.executable, "-c", code]
        builder = subprocess.Popen(command, stdin=lock, cwd=ROOT, start_new_session=True)
    assert builder.wait(60) == -signal.SIGKILL
    wait_until(lambda: not is_locked(cache))
    compiler(WORKS)
    assert build.build_now() is not None
    assert names(cache) == all_that_a_build_leaves()


def test_fault_119_a_full_disk_leaves_no_empty_marker(compiler, cache, monkeypatch):
    compiler("exit 1")
    make_private(cache)

    def fail(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        build.compile_library(build.library_path(), build.GENERATION)
    assert names(cache) == set()


def test_only_leftovers_of_the_same_library_are_swept(compiler, cache):
    for name in ("building-generation-x", "building-training-x"):  # the second one may be in use
        make_private(cache / name)
        (cache / name / "model.o").touch()
    assert build.build_now() is not None
    assert names(cache) == all_that_a_build_leaves() | {"building-training-x"}


# ---- compiler errors


def set_back(path, seconds):
    changed = path.stat().st_mtime - seconds
    os.utime(path, (changed, changed))


def test_fault_119_a_compiler_error_is_kept_with_its_date_and_not_tried_again_for_a_day(compiler, cache, monkeypatch):
    compiler('echo "fatal error: no such header" >&2; exit 1')
    assert build.build_now() is None
    marker = build.failed_marker(build.library_path())
    assert names(cache) == {marker.name, "generation.lock"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\nfatal error: no such header\n", marker.read_text())
    tried = len(compiler.calls)
    assert tried == len(build.FLAGS)
    set_back(marker, 23 * HOUR)
    monkeypatch.setattr(subprocess, "Popen", None)
    assert build.build_now() is None and not build.start_background_build()
    assert len(compiler.calls) == tried


def test_fault_119_after_a_day_a_compiler_error_is_replaced_and_after_a_success_it_is_gone(compiler, cache):
    compiler('echo "old" >&2; exit 1')
    assert build.build_now() is None
    marker = build.failed_marker(build.library_path())
    set_back(marker, 25 * HOUR)
    compiler('echo "new" >&2; exit 1')
    assert build.build_now() is None
    assert marker.read_text().endswith("\nnew\n")
    set_back(marker, 25 * HOUR)
    compiler(WORKS)
    assert build.build_now() is not None
    assert names(cache) == all_that_a_build_leaves()


def test_flags_that_a_compiler_does_not_know_are_left_out(compiler):
    compiler(f'case "$*" in *-march*) exit 1;; esac; {WORKS}')
    assert build.build_now() is not None
    assert "-mcpu=native" in compiler.calls[-1]


# ---- what is loaded


@pytest.mark.parametrize("bits", [stat.S_IWGRP, stat.S_IWOTH])
@pytest.mark.parametrize("what", ["folder", "library"])
def test_what_others_may_write_to_is_not_loaded(compiler, cache, what, bits):
    assert build.build_now() is not None
    path = cache if what == "folder" else build.library_path()
    path.chmod(0o700 | bits)
    assert build.load_library() is None and build.build_now() is None
    if what == "folder":
        build.library_path().unlink()
        assert build.build_now() is None
    assert len(compiler.calls) == 1


def test_what_belongs_to_another_user_is_not_loaded_and_nothing_is_built_there(compiler, cache, monkeypatch):
    assert build.build_now() is not None
    monkeypatch.setattr(os, "geteuid", lambda: cache.stat().st_uid + 1)
    assert build.load_library() is None
    build.library_path().unlink()
    assert build.build_now() is None
    assert len(compiler.calls) == 1


def test_a_library_that_was_cut_is_not_loaded_but_built_again(compiler):
    assert build.build_now() is not None
    path = build.library_path()
    whole = path.read_bytes()
    path.unlink()  # another file in its place: to cut the one that is loaded would kill this process
    path.write_bytes(whole[: len(whole) // 3])
    assert build.load_library() is None
    assert build.build_now() is not None
    assert path.read_bytes() == whole


def test_without_a_compiler_there_is_no_library(cache, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert build.load_library() is None and build.build_now() is None and not build.start_background_build()
    assert not cache.exists()


@pytest.mark.parametrize("command", ['g++ "-O2', "g++ '", "g++ \\"])
def test_a_cxx_that_is_no_command_is_one_warning_and_the_next_compiler_is_taken(monkeypatch, capsys, command):
    monkeypatch.delenv("CXX", raising=False)
    expected = build.compiler()
    monkeypatch.setenv("CXX", command)
    build.split_command.cache_clear()
    assert [build.compiler() for _ in range(3)] == [expected] * 3
    assert build.load_library() is None
    assert re.fullmatch(
        r"warning: CXX=g\+\+ .*: not a command \(No .*\), ignored; correct .*\n", capsys.readouterr().err
    )


@pytest.mark.parametrize("name", ["cpu_identity", "torch_version"])
def test_another_cpu_or_torch_gets_a_library_of_its_own(compiler, monkeypatch, name):
    path = build.library_path()
    monkeypatch.setattr(build, name, lambda: "another")
    assert build.library_path() not in (path, None)


def test_fault_119_other_flags_get_a_library_of_their_own(compiler, monkeypatch):
    path = build.library_path()
    monkeypatch.setattr(build, "FLAGS", [[*build.COMMON, "-O1"]])
    assert build.library_path() not in (path, None)
    monkeypatch.setenv("CXX", f"{compiler.path} -g")
    assert build.library_path() not in (path, None)


# ---- other CPUs

KERNEL_TESTS = [f"tests/kernels/test_native_{name}.py" for name in ("attention", "gelu", "model", "sampler")]
X86 = {"x86-64": "sse2", "x86-64-v2": "sse4_2", "x86-64-v3": "avx2", "x86-64-v4": "avx512bw"}  # level, one of its flags
OTHERS = [  # machine and flag of its compiler, instruction of each int8 product
    ("aarch64 -mcpu=neoverse-n1", "sdot"),
    ("aarch64 -march=armv8-a", "sadalp"),
    pytest.param("x86_64 -march=alderlake", "{vex} vpdpbusd", marks=pytest.mark.slow),
    pytest.param("x86_64 -march=sapphirerapids", "vpdpbusd", marks=pytest.mark.slow),
    pytest.param("riscv64 -march=rv64gc", "mulw", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("target", "instruction"), OTHERS)
def test_the_code_for_other_cpus_gives_no_warning_and_multiplies_bytes_as_they_do(tmp_path, target, instruction):
    machine, flag = target.split()
    compiler, disassembler = f"{machine}-linux-gnu-g++", f"{machine}-linux-gnu-objdump"
    if not shutil.which(compiler):
        pytest.skip(f"needs a compiler for another CPU: apt-get install g++-{machine.replace('_', '-')}-linux-gnu")
    warnings = ["-Wall", "-Werror", "-Wno-maybe-uninitialized"]  # the last is false in GCC 12's own <immintrin.h>

    def functions(source):
        """Returns the assembler code of each function."""
        code = str(tmp_path / f"{source}.o")
        subprocess.run([compiler, *build.COMMON, flag, *warnings, "-c", build.FOLDER / source, "-o", code], check=True)
        shown = subprocess.run([disassembler, "--disassemble", "--demangle", code], capture_output=True, text=True)
        return re.split(r"\n\n(?!\w+ <\.L)", shown.stdout)  # labels inside of functions, which RISC-V's code keeps

    with ThreadPoolExecutor() as threads:
        found = threads.map(functions, itertools.chain(*build.SOURCES.values()))
        products = [code for code in itertools.chain(*found) if re.match(r".* <.*\btile<.*\bInt8,", code)]
    assert products and all(instruction in product for product in products)


@pytest.mark.slow
@pytest.mark.parametrize("command", [*(f"c++ -march={level}" for level in X86), "clang++ -march=native"])
def test_code_of_other_compilers_and_for_other_cpus_passes_the_tests_of_the_kernels(tmp_path, command):
    program, flag = command.split()
    level = flag.removeprefix("-march=")
    if not shutil.which(program) or (level in X86 and X86[level] not in str(cpu_identity())):
        pytest.skip(f"needs {program} and a CPU with the instructions of {level}")
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/bash\nexec {program} "${{@/-march=native/{flag}}}"\n')
    compiler.chmod(0o755)
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *KERNEL_TESTS]
    run = subprocess.run(tests, cwd=ROOT, env=os.environ | {"CXX": str(compiler)}, capture_output=True, text=True)
    assert run.returncode == 0 and "skipped" not in run.stdout, run.stdout
