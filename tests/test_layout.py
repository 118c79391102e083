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
SOURCE_SUFFIXES = {".py", ".pyi", ".pyx", ".pxd", ".pxi", ".c", ".cpp", ".h", ".cu", ".cuh", ".sh"}

# From the top: a module imports from its own layer and those below it. The name of a folder stands for all that is in
# it and has no place of its own. The package itself only lists names, and imports them when they are used.
PROGRAMS, CHOICE, BACKENDS, SHARED = "programs", "the choice of a backend", "backends", "what backends share"
LAYERS = {
    "the package": "pyllmc",
    PROGRAMS: "llmc train generate evaluate convert verify plot __main__ datasets.__main__",
    "what a run needs": "plan prepare needs provenance runs record curves settings datasets distributed",
    "what is computed, and its files": "model optimizer schedules outliers questions checkpoint dataloader ops "
    "modelfile statefile huggingface",
    "tokens": "tokenizer tokenfile evalfile",
    "ground": "config tensors sharding rng files lock floats safetensors devices hardware hub extras console logs "
    "events figures cli group channel rendezvous mpi nccl",
    CHOICE: "backends",
    BACKENDS: "_ops _cuda",
    SHARED: "parts",
}
SHARED_MODULES = tuple(f"pyllmc.{name}" for name in LAYERS[SHARED].split())
PLACES = {name: layer for layer, names in LAYERS.items() for name in names.split()}


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
    name = module.removeprefix("pyllmc.")
    place = PLACES.get(name) or PLACES.get(name.split(".")[0])
    assert place, f"{module} has no place in LAYERS, nor in the diagram of CONTRIBUTING.md"
    return place


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downward(module):
    order = list(LAYERS)
    for imported in imports(module):
        assert imported.startswith("pyllmc"), f"{module} imports {imported}, which is not part of the package"
        assert order.index(layer(imported)) >= order.index(layer(module)), (
            f"{module} ({layer(module)}) imports {imported} ({layer(imported)}), which is above it"
        )
        assert layer(imported) != BACKENDS or layer(module) in (PROGRAMS, CHOICE, BACKENDS), (
            f"{module} imports the backend {imported} without asking backends.py"
        )


def test_the_layers_hold_what_there_is():
    names = {module.removeprefix("pyllmc.") for module in MODULES}
    assert sorted(PLACES.keys() - names) == [], "a module in LAYERS is not there"
    programs = {m for m in MODULES if '\nif __name__ == "__main__":' in MODULES[m].read_text(encoding="utf-8")}
    assert {module for module in MODULES if layer(module) == PROGRAMS} == programs


def test_imports_are_seen():
    """So that the tests above cannot pass because they see nothing."""
    assert "pyllmc.backends" in imports("pyllmc.model")
    assert imports("pyllmc.backends") == {"pyllmc._ops", "pyllmc._cuda"}
    assert "pyllmc.prepare" in imports("pyllmc.train") and "pyllmc.model" in imports("pyllmc.prepare")


@pytest.mark.parametrize("module", MODULES)
def test_docstrings_name_who_calls_and_who_is_called(module):
    """What a module says after "Called by" imports it, and what it says after "calls" is imported by it."""
    text = " ".join((ast.get_docstring(ast.parse(MODULES[module].read_text(encoding="utf-8"))) or "").split())
    folder = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]

    def named(word):
        for names in re.findall(word + r" (.*?)(?:[;:] |\.(?: |$))", text):
            for name in re.findall(r"(?<![\w/])(\w+)\.py\b", names):
                places = (f"{place}.{name}" for place in (folder, "pyllmc", "pyllmc.datasets"))
                yield next((place for place in places if place in MODULES), name)

    for caller in named("[Cc]alled by"):
        assert caller in MODULES and module in imports(caller), (
            f"{module} says that {caller} calls it, which does not import it"
        )
    for called in named("[Cc]alls"):
        assert called in imports(module), f"{module} says that it calls {called}, and does not import it"


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
    allowed = (f"pyllmc.{folder}", *SHARED_MODULES)
    for path in sorted((PACKAGE / folder).rglob("*")):
        if path.suffix in (".py", ".pyx", ".pxi", ".pxd"):
            for name in pattern.findall(path.read_text(encoding="utf-8")):
                assert name.startswith(allowed), f"{path.relative_to(ROOT)} imports {name}"


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
