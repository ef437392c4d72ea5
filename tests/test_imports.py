"""Imports run down only. What is read here is what runs: chains of imports, however long."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import batchrun

ROOT = Path(__file__).parent.parent
TORCH = {"torch", "transformers", "accelerate", "flashinfer", "triton"}

# What a package may import beside itself and what stands in no package: `errors`, `machine` and
# the other files at the top of batchrun. Whatever is not listed would be an import that runs up.
MAY_IMPORT = {
    "allocator": set(),
    "objectstore": set(),
    "jobs": {"objectstore"},
    "models": {"jobs", "objectstore"},
    "prompts": {"models"},
    "grammars": {"prompts"},
    "engine": {"allocator", "grammars", "models", "prompts"},
    "peek": {"jobs", "prompts"},
    "report": {"jobs", "peek"},
    "fleet": {"allocator", "engine", "grammars", "jobs", "models", "runner"},
    "runner": {
        *("allocator", "engine", "estimate", "fleet", "grammars", "jobs", "models", "objectstore"),
        *("prompts", "report"),
    },
    "estimate": {"engine", "fleet", "grammars", "jobs", "models", "prompts", "runner"},
    "options": {"engine", "jobs"},
    "specs": {
        *("engine", "fleet", "grammars", "jobs", "models", "objectstore", "options", "prompts"),
        "runner",
    },
    "submission": {"jobs", "objectstore", "runner"},
    "notebook": {"jobs", "runner"},
    "llm": {"engine", "jobs", "notebook", "runner", "specs", "submission"},
    "api": {"jobs", "notebook", "objectstore", "options", "peek", "runner", "specs", "submission"},
    "cli": {
        *("allocator", "engine", "estimate", "fleet", "jobs", "models", "objectstore"),
        *("options", "peek", "prompts", "report", "runner", "specs", "submission"),
    },
}

# Importing these loads no torch: they are pure, or what a command needs before there is anything
# to compute.
TORCH_FREE = (
    "allocator.arena",
    "allocator.cuda",
    "engine.core",
    "engine.scheduler",
    "engine.speculation.speculator",
    "jobs.output.rejoin",
    "jobs.verify",
    "models.resolve",
    "peek",
    "prompts.template",
    "specs",
    "submission",
    "api",
    "llm",
    "fleet.loop",
    "runner.reader",
    "runner.supervisor",
    "runner.job_run",
    *(f"cli.{file.stem}" for file in sorted((ROOT / "batchrun/cli").glob("*.py"))[1:]),
)


def name_of(path):
    parts = [*path.relative_to(ROOT).with_suffix("").parts]
    if parts[0] != "batchrun":
        parts.insert(0, "batchrun")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    name_of(path): path
    for folder in ("allocator", "jobs", "batchrun")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not any((ROOT / parent).is_symlink() for parent in path.relative_to(ROOT).parents)
}


def top_level(tree):
    """Every node that runs at import: not function bodies, not `if TYPE_CHECKING:`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from top_level(node)


@cache
def imports(module, *, at_import=False):
    """The modules that one imports; with at_import, only what importing it imports."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    found = set()
    for node in top_level(tree) if at_import else ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: imports name their whole path"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return frozenset(found)


def chain(module, wanted, *, seen=()):
    """The shortest way that was found from a module to a package of `wanted`, at import."""
    waiting, before = [module], {module: None}
    for current in waiting:
        if current.partition(".")[0] in wanted:
            way = [current]
            while before[way[-1]]:
                way.append(before[way[-1]])
            return way[::-1]
        for name in imports(current, at_import=True) if current in MODULES else ():
            if name not in before:
                before[name] = current
                waiting.append(name)
    return []


def package(module):
    """The package of batchrun that a module is in; "" for the files at its top."""
    name = [*module.split("."), ""][1]
    return name if name in MAY_IMPORT else ""


def test_every_module_of_the_tree_is_read():
    assert len(MODULES) > 150
    here = {parts[1] for name in MODULES if len(parts := name.split(".")) > 2}
    alone = {"specs", "submission", "notebook", "llm", "api", "options", "peek"}
    assert here | alone == set(MAY_IMPORT)


def test_what_stands_in_no_package_imports_no_package():
    alone = [m for m in MODULES if not package(m) and m not in ("batchrun", "batchrun.__main__")]
    assert len(alone) > 4
    assert [(m, i) for m in alone for i in imports(m) if i in MODULES and package(i)] == []


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_imports_run_down(name):
    allowed = MAY_IMPORT[name] | {name, ""}
    wrong = [
        f"{module} imports {other}"
        for module in MODULES
        if package(module) == name
        for other in imports(module)
        if other in MODULES and package(other) not in allowed
    ]
    assert wrong == []


def test_only_the_command_line_knows_click():
    knows = {package(m) for m in MODULES if any(i.partition(".")[0] == "click" for i in imports(m))}
    assert knows == {"cli"}


@pytest.mark.parametrize("name", ["jobs", "models", "prompts", "specs", "submission", "api", "cli"])
def test_what_knows_nothing_of_engines_names_none(name):
    engines = {"batchrun.allocator.tensor", "batchrun.engine.executor", "batchrun.engine.engine"}
    assert [m for m in MODULES if package(m) == name and imports(m) & engines] == []


def test_torch_is_imported_in_one_file_of_the_allocator_and_nowhere_in_jobs():
    for name, allowed in (("allocator", {"batchrun.allocator.tensor"}), ("jobs", set())):
        heavy = {
            module
            for module in MODULES
            if package(module) == name
            and any(other.partition(".")[0] in TORCH for other in imports(module))
        }
        assert heavy == allowed


def test_one_file_knows_the_cuda_driver():
    knows = {m for m in MODULES if any(i.partition(".")[0] == "cuda" for i in imports(m))}
    assert knows == {"batchrun.allocator.cuda"}


@pytest.mark.parametrize("name", TORCH_FREE)
def test_importing_it_loads_no_torch(name):
    assert " -> ".join(chain(f"batchrun.{name}", TORCH)) == ""


def test_python_agrees_that_no_torch_is_loaded():
    names = ", ".join(f"batchrun.{name}" for name in TORCH_FREE)
    code = f"import sys, {names}; print(sorted({TORCH!r} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "[]\n"


def test_what_reads_no_rows_loads_no_arrow():
    """It takes longer to load than `batchrun list` takes for all else."""
    code = "import sys, batchrun.jobs.folder; print({'pyarrow', 'numpy'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "set()\n"


def test_the_functions_of_the_package_load_nothing_before_they_are_asked_for():
    code = (
        "import sys, batchrun\n"
        "assert not {'torch', 'pyarrow', 'click', 'numpy'} & set(sys.modules)\n"
        "assert all(callable(getattr(batchrun, name)) for name in batchrun.__all__)\n"
        "assert 'torch' not in sys.modules\n"
        "try: batchrun.nothing\n"
        "except AttributeError: print('fine')\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "fine\n"
    assert not {f"batchrun.{name}" for name in batchrun.__all__} & set(MODULES)


def test_nothing_of_ours_is_imported_by_another_name():
    """`allocator` and `jobs` are folders of the repository, and packages of batchrun alone."""
    files = [
        *MODULES.values(),
        *(p for d in ("tests", "benchmarks") for p in (ROOT / d).rglob("*.py")),
    ]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {n.partition(".")[0] for n in names} & {"allocator", "jobs"}, path


def test_no_two_modules_import_each_other():
    """Nor any longer circle, of imports wherever they stand."""
    done = set()

    def visit(module, way):
        assert module not in way, " -> ".join([*way[way.index(module) :], module])
        if module in done:
            return
        for other in imports(module):
            if other in MODULES:
                visit(other, [*way, module])
        done.add(module)

    for module in MODULES:
        if package(module) == "allocator":
            visit(module, [])


def test_names_are_imported_from_where_they_are_defined():
    """A name that is handed on is a second name for one thing."""
    wrong = []
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module in MODULES:
                wrong += [
                    f"{module} imports {alias.name} from {node.module}"
                    for alias in node.names
                    if f"{node.module}.{alias.name}" not in MODULES
                    and alias.name not in defined(node.module)
                ]
    assert wrong == []


@cache
def defined(module):
    """Names that a module binds itself, other than by imports."""
    names = set()
    for node in top_level(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    names.update(n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef))
    return names


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
