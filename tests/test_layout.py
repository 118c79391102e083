"""The shape of the source: layers that import only downward, no cycle of imports, no file that is too long, no compiler
flag that changes arithmetic."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "pyllmc"
MAX_LINES = 600
FORBIDDEN_FLAGS = ("-Ofast", "-ffast-math", "-funsafe-math-optimizations", "-march=native", "-mcpu=native")
SOURCE_FOLDERS = ("pyllmc", "tests", "bench", "data", "docs")
SOURCE_SUFFIXES = {".py", ".pyi", ".pyx", ".pxd", ".pxi", ".c", ".h", ".cu", ".cuh", ".sh"}

PACKAGE_ITSELF, PROGRAM, LIBRARY, CHOICE, BACKEND = "package", "program", "library", "choice of a backend", "backend"
# What a module of each layer may import. The package itself only lists names, and imports them when they are used.
BELOW = {
    PACKAGE_ITSELF: {PROGRAM, LIBRARY, CHOICE, BACKEND},
    PROGRAM: {PROGRAM, LIBRARY, CHOICE, BACKEND},
    LIBRARY: {LIBRARY, CHOICE},
    CHOICE: {BACKEND},
    BACKEND: {BACKEND},
}


def module_name(path):
    """pyllmc.datasets.text of pyllmc/datasets/text.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def is_type_checking(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def nodes_that_run(tree):
    """Every node but those that only a type checker reads."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if not is_type_checking(child):
            yield from nodes_that_run(child)


def imports(module):
    """Names of pyllmc's modules that this one imports, inside functions and by import_module too."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in nodes_that_run(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) + 1 - node.level]) if node.level else ""
            base = ".".join(filter(None, [base, node.module]))
            # __version__ stands in the package itself, which imports nothing while it is imported.
            names = [alias.name for alias in node.names if alias.name != "__version__"]
            found |= {f"{base}.{name}" if f"{base}.{name}" in MODULES else base for name in names}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            found |= {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    return {name for name in found if name.split(".")[0] in ("pyllmc", "bench", "tests")}


def layer(module):
    parts = module.split(".")
    if len(parts) == 1:
        return PACKAGE_ITSELF
    if parts[1] in ("_ops", "_cuda"):
        return BACKEND
    if parts[1] == "backends":
        return CHOICE
    source = MODULES[module].read_text(encoding="utf-8") if module in MODULES else ""
    return PROGRAM if '\nif __name__ == "__main__":' in source else LIBRARY


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downward(module):
    for imported in imports(module):
        assert imported.startswith("pyllmc"), f"{module} imports {imported}, which is not part of the package"
        assert layer(imported) in BELOW[layer(module)], (
            f"{module} ({layer(module)}) imports {imported} ({layer(imported)}), which is not below it"
        )


def test_the_layers_are_what_they_are_called():
    """So that the test above cannot pass because it sees nothing."""
    assert layer("pyllmc.train") == layer("pyllmc.generate") == PROGRAM
    assert layer("pyllmc.model") == layer("pyllmc.optimizer") == layer("pyllmc.checkpoint") == LIBRARY
    assert "pyllmc.backends" in imports("pyllmc.model")
    assert imports("pyllmc.backends") == {"pyllmc._ops", "pyllmc._cuda"}
    assert "pyllmc.prepare" in imports("pyllmc.train") and "pyllmc.model" in imports("pyllmc.prepare")


def test_no_cycle_of_imports():
    done = set()

    def visit(module, way):
        assert module not in way, "a cycle: " + " -> ".join([*way[way.index(module) :], module])
        if module in MODULES and module not in done:
            for imported in sorted(imports(module) - {module}):
                visit(imported, [*way, module])
            done.add(module)

    for module in MODULES:
        visit(module, [])


@pytest.mark.parametrize("folder", ["_ops", "_cuda"])
def test_kernels_import_nothing_from_above(folder):
    pattern = re.compile(r"^\s*(?:from|import|cimport)\s+(pyllmc[\w.]*)", re.MULTILINE)
    for path in sorted((PACKAGE / folder).rglob("*")):
        if path.suffix in (".py", ".pyx", ".pxi", ".pxd"):
            for name in pattern.findall(path.read_text(encoding="utf-8")):
                assert name.startswith(f"pyllmc.{folder}"), f"{path.relative_to(ROOT)} imports {name}"


def test_no_file_is_too_long():
    paths = [path for folder in SOURCE_FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SOURCE_SUFFIXES]
    paths += [ROOT / "setup.py", ROOT / ".ci" / "run"]
    lengths = {str(path.relative_to(ROOT)): len(path.read_bytes().splitlines()) for path in paths}
    assert len(lengths) > 50
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_no_flag_changes_arithmetic():
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert "-ffp-contract=off" in strings
    assert [text for text in strings if any(flag in text for flag in FORBIDDEN_FLAGS)] == []
    pragma = re.compile(r"#\s*pragma\s+(GCC|clang)\s+(optimize|fp)|optimize\s*\(\s*\"|float_control|-ffast-math\b")
    for path in sorted(PACKAGE.rglob("*")):
        if path.suffix in SOURCE_SUFFIXES - {".py", ".pyi"}:
            found = pragma.search(path.read_text(encoding="utf-8"))
            assert not found, f"{path.relative_to(ROOT)}: {found.group()}"
