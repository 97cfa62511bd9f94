"""The shape of the code: which module imports which, calls that are forbidden, the length of functions."""

import ast
import subprocess
import sys

import pytest
from paths import ROOT

MODULES = sorted((ROOT / "gpt").rglob("*.py"))
SCRIPTS = [ROOT / "train.py", ROOT / "sample.py", ROOT / "data/prepare.py"]
PRODUCT = [*MODULES, *SCRIPTS]
SCRIPT_NAMES = {path.stem for path in SCRIPTS}


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path, at_import_only=False):
    """Returns the names of the modules that a file imports; `from gpt import x` counts as gpt.x if that is a file or a
    folder."""
    modules = set()
    tree = tree_of(path)
    nodes = at_top(tree) if at_import_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: relative import"
            within = {f"{node.module}.{alias.name}" for alias in node.names}
            inner = {name for name in within if is_module(name)}
            modules |= inner
            if len(inner) < len(within):
                modules.add(node.module)
    return modules


def is_module(name):
    path = ROOT / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").exists()


def at_top(tree):
    """Yields the nodes that run when the module is imported: everything outside functions."""
    todo = list(tree.body)
    while todo:
        node = todo.pop()
        only_typed = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if not only_typed and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield node
            todo += ast.iter_child_nodes(node)


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of_gpt(path, at_import_only=False):
    """Returns the names of the modules of gpt that a file imports; the package itself does not count."""
    return {name for name in imported(path, at_import_only) if name.startswith("gpt.")} - {module_name(path)}


def graph(at_import_only=False):
    """Returns, for each module of gpt, the modules of gpt that it imports."""
    return {module_name(path): imports_of_gpt(path, at_import_only) for path in MODULES}


BASE = {"config", "errors", "files", "device", "model", "attention", "loss", "quantize"}
# Room -> the rooms that it may import. A name is a package of gpt or, in "base", a module of it.
ROOMS = {
    "base": set(),
    "text": {"base"},
    "kernels": {"base"},
    "checkpoint": {"base", "text"},
    "train": {"base", "text", "kernels", "checkpoint"},
    "generate": {"base", "text", "kernels", "checkpoint"},
    "report": {"base", "text", "checkpoint", "train", "generate"},
    "commands": {"base", "report"},  # thin entry points: gpt.plot, gpt.export
    "library": {"base", "kernels", "generate"},  # import gpt
}
# Arrows between modules of the base, which has an order of its own.
BASE_ARROWS = {
    "attention": set(),
    "errors": set(),
    "files": {"errors"},
    "config": {"errors"},
    "device": {"errors"},
    "loss": set(),
    "model": {"attention", "config", "loss"},
    "quantize": {"loss", "model"},
}


def room_of(module):
    """Returns the room of a dotted module name of gpt."""
    name = module.split(".")[1] if "." in module else ""
    return "library" if not name else "base" if name in BASE else name if (ROOT / "gpt" / name).is_dir() else "commands"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_arrows_between_rooms_point_down(path):
    """Imports inside functions count too."""
    module = module_name(path)
    room = room_of(module)
    for other in imports_of_gpt(path):
        if room_of(other) != room:
            assert room_of(other) in ROOMS[room], f"{module} imports {other}"
    assert room in ROOMS


@pytest.mark.parametrize("name", sorted(BASE))
def test_arrows_within_the_base_point_down(name):
    paths = [path for path in MODULES if module_name(path).split(".")[1:2] == [name]]
    arrows = {other.split(".")[1] for path in paths for other in imports_of_gpt(path)} - {name}
    assert paths and arrows <= BASE_ARROWS[name]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_gpt_never_imports_the_scripts(path):
    assert not {name.split(".")[0] for name in imported(path)} & (SCRIPT_NAMES | {"data", "tests", "benchmarks"})


def test_few_names_stand_at_the_top_of_the_package():
    names = [path.name for path in (ROOT / "gpt").iterdir() if path.name != "__pycache__"]
    assert len(names) < 24, sorted(names)


def test_only_train_sees_both_training_and_generation():
    assert {path.name for path in PRODUCT if {"train", "generate"} <= rooms_seen(path)} == {"train.py"}


def rooms_seen(path):
    """Returns the rooms that a file imports from."""
    return {room_of(name) for name in imported(path) if name.startswith("gpt.")}


def test_the_imports_within_gpt_have_no_circle():
    remaining = {module: set(others) for module, others in graph(at_import_only=True).items()}
    while remaining:
        free = {module for module, others in remaining.items() if not others & remaining.keys()}
        assert free, f"a circle among {sorted(remaining)}"
        remaining = {module: others for module, others in remaining.items() if module not in free}


def test_the_search_for_imports_finds_imports(tmp_path):
    (tmp_path / "x.py").write_text("from gpt import errors, train, __version__\nfrom gpt.train import log, nothing")
    assert imported(tmp_path / "x.py") == {"gpt", "gpt.errors", "gpt.train", "gpt.train.log"}
    imports = graph(at_import_only=True)
    assert "gpt.errors" in imports["gpt.config"]
    assert "gpt.config" in imports["gpt.model"]
    assert "gpt.generate.generator" in imports_of_gpt(ROOT / "gpt/__init__.py")  # inside a function
    assert sum(map(len, imports.values())) > 20


def loaded_by(code):
    """Returns the names in sys.modules after `code` has run in a fresh process."""
    code = f"{code}\nimport sys\nprint(' '.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_importing_gpt_loads_no_torch():
    loaded = loaded_by("import gpt")
    assert "gpt" in loaded
    assert not loaded & {"torch", "wandb", "transformers"}


def test_sample_imports_neither_wandb_nor_transformers():
    loaded = loaded_by("import sample")
    assert "torch" in loaded
    assert not loaded & {"wandb", "transformers", "tokenizers", "gpt.train.log"}


@pytest.mark.parametrize("path", PRODUCT, ids=name_of)
def test_nothing_outside_the_tests_imports_transformers(path):
    assert not {name.split(".")[0] for name in imported(path)} & {"transformers", "accelerate", "lightning"}


# ---- forbidden calls

FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "torch.save", "os.system", "os.popen"}
FORBIDDEN_CALLS |= {"torch.distributed.checkpoint.load", "dcp.load", "yaml.load"}
FORBIDDEN_CALLS |= {"torch.jit.load", "torch.export.load", "torch.hub.load", "torch.hub.load_state_dict_from_url"}


def dotted(node):
    """Returns "torch.load" for the expression torch.load, "" for an expression that is not a dotted name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and dotted(node.value):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def dangers(path):
    """Returns the lines of a file that read pickles, evaluate text or start a shell."""
    lines = [name for name in imported(path) if name.split(".")[0] in FORBIDDEN_MODULES]
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            lines += [f"line {node.lineno}: {name}" for name in sorted(names & FORBIDDEN_CALLS)]
        if not isinstance(node, ast.Call):
            continue
        if dotted(node.func) in FORBIDDEN_CALLS:
            lines.append(f"line {node.lineno}: {dotted(node.func)}")
        for keyword in node.keywords:
            constant = isinstance(keyword.value, ast.Constant)
            if keyword.arg in ("shell", "allow_pickle") and not (constant and keyword.value.value is False):
                lines.append(f"line {node.lineno}: {keyword.arg}")
    return lines


PICKLES = ROOT / "gpt/checkpoint/pickles.py"


@pytest.mark.parametrize("path", [path for path in PRODUCT if path != PICKLES], ids=name_of)
def test_fault_105_no_pickle_no_evaluation_no_shell(path):
    assert dangers(path) == []


def test_fault_105_one_function_opens_pickles_and_by_weights_only():
    assert [line.split(": ")[1] for line in dangers(PICKLES)] == ["torch.load"]
    [reader] = [node for node in tree_of(PICKLES).body if getattr(node, "name", "") == "read_pickle"]
    [call] = [node for node in ast.walk(reader) if isinstance(node, ast.Call) and dotted(node.func) == "torch.load"]
    [safely] = [keyword.value for keyword in call.keywords if keyword.arg == "weights_only"]
    assert isinstance(safely, ast.Constant)
    assert safely.value is True


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "import torch\ntorch.jit.load('x')",
        "eval('1')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import subprocess\nsubprocess.run('x', shell=flag)",
        "import yaml\nyaml.load('x')",
    ],
)
def test_fault_105_the_search_finds_forbidden_calls(tmp_path, line):
    path = tmp_path / "bad.py"
    path.write_text(line)
    assert dangers(path)


# ---- printing


@pytest.mark.parametrize("path", PRODUCT, ids=name_of)
def test_fault_123_text_goes_to_stdout_by_say_which_names_a_full_disk(path):
    calls = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call) and dotted(node.func) == "print"]
    assert not calls or name_of(path) == "gpt/errors.py"


# ---- shape


def functions(path):
    return [node for node in ast.walk(tree_of(path)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


@pytest.mark.parametrize("path", PRODUCT, ids=name_of)
def test_no_function_is_longer_than_thirty_lines(path):
    script = path in SCRIPTS
    long = [
        f"{node.name}: {size}"
        for node in functions(path)
        for size in [node.end_lineno - node.lineno + 1]
        if size > (60 if script and node.name == "main" else 30)
    ]
    assert long == []


@pytest.mark.parametrize("path", PRODUCT, ids=name_of)
def test_every_file_begins_with_a_docstring(path):
    assert ast.get_docstring(tree_of(path))


ELSEWHERE = {
    "gpt/plot.py": "tests/report/test_plot.py",
    "gpt/export.py": "tests/report/test_export.py",
    "gpt/__main__.py": "tests/test_wheel.py",
}


@pytest.mark.parametrize("path", [path for path in PRODUCT if path.name != "__init__.py"], ids=name_of)
def test_every_module_has_a_test_file_of_its_name(path):
    folder = path.parent.relative_to(ROOT / "gpt") if path in MODULES else ""
    assert (ROOT / ELSEWHERE.get(name_of(path), ROOT / "tests" / folder / f"test_{path.name}")).exists()
