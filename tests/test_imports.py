"""Imports run one way: the parts that know nothing of each other stay that way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"allocator", "batchrun", "jobs"}
TORCH = {"torch", "transformers", "accelerate", "flashinfer"}


def modules(folder):
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, f"no Python files in {folder}"
    return found


def imports(path, *, module_level=False):
    """Dotted names that a file imports; with module_level, only what importing it imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = top_level(tree) if module_level else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            base = ".".join([*package, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def top_level(tree):
    """Every node that runs at import: not function bodies, not `if TYPE_CHECKING:`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from top_level(node)


def under(name, packages):
    return any(name == package or name.startswith(package + ".") for package in packages)


def violations(folder, forbidden, *, module_level=False, allow=()):
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules(folder)
        if path.name not in allow
        for name in imports(path, module_level=module_level)
        if under(name, forbidden)
    ]


def test_allocator_imports_nothing_of_ours_and_torch_in_one_file():
    assert violations("allocator", OURS - {"allocator"}) == []
    assert violations("allocator", TORCH, allow=("tensor.py",)) == []


def test_one_file_knows_the_cuda_driver():
    for folder in OURS:
        assert violations(folder, {"cuda"}, allow=("cuda.py",)) == []


def test_jobs_import_nothing_of_ours_and_no_torch():
    assert violations("jobs", (OURS - {"jobs"}) | TORCH) == []


def test_engine_knows_neither_jobs_nor_the_command_line():
    assert violations("batchrun/engine", {"jobs", "batchrun.cli", "batchrun.worker"}) == []


@pytest.mark.parametrize("name", ["core", "scheduler", "template", "text"])
def test_pure_parts_of_the_engine_never_import_torch(name):
    found = list(imports(ROOT / "batchrun" / "engine" / f"{name}.py"))
    assert [name for name in found if under(name, TORCH)] == []


def test_only_the_worker_sees_all_three_packages():
    three = {}
    for path in modules("batchrun"):
        seen = {name.split(".")[0] for name in imports(path)} & OURS
        seen |= {"engine"} if any(under(n, {"batchrun.engine"}) for n in imports(path)) else set()
        if {"allocator", "jobs"} <= seen:
            three[str(path.relative_to(ROOT))] = seen
    assert set(three) <= {"batchrun/worker.py"}


def test_the_command_line_never_imports_torch_when_it_is_imported():
    heavy = TORCH | {"batchrun.worker", "batchrun.engine.model", "batchrun.engine.executor"}
    assert violations("batchrun/cli", heavy, module_level=True) == []
    assert violations("batchrun/report", heavy | {"jobs"}) == []


@pytest.mark.parametrize("name", ["cli.run", "worker"])
def test_torch_is_not_loaded_before_there_is_something_to_compute(name):
    code = f"import sys, batchrun.{name}; print(sorted({TORCH!r} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "[]\n"


def test_what_submit_checks_imports_no_torch():
    for name in ("param_columns", "reader"):
        found = imports(ROOT / "batchrun" / f"{name}.py")
        assert [n for n in found if under(n, TORCH)] == []


def test_models_import_torch_only_to_convert():
    assert [n for n in imports(ROOT / "batchrun/models.py") if under(n, {"torch"})] == []
    found = imports(ROOT / "batchrun/models.py", module_level=True)
    assert [n for n in found if under(n, TORCH)] == []


def test_top_level_sees_what_runs_at_import_and_nothing_else():
    tree = ast.parse(
        "import a\n"
        "if TYPE_CHECKING:\n    import b\n"
        "try:\n    import c\nexcept E:\n    import d\n"
        "def f():\n    import e\n"
        "class C:\n    import g\n    def h(self):\n        import i\n"
    )
    seen = {a.name for n in top_level(tree) if isinstance(n, ast.Import) for a in n.names}
    assert seen == {"a", "c", "d", "g"}
