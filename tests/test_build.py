"""setup.py: what it says where something is missing, and what it does with what the compiler can and cannot do.

The compiler here is a script: it hands the build's probes to the real compiler, refuses the flags it is told to refuse,
notes how it was called, and makes an empty file of every real source. That the real thing builds and runs, the other
tests show: tests/test_packaging.py from the source distribution.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytest.importorskip("Cython", minversion="3.0.12")
pytest.importorskip("setuptools", minversion="77")

ROOT = Path(__file__).resolve().parent.parent
ON_X86 = platform.machine().lower() in ("x86_64", "amd64")
COMPILER = """#!/bin/sh
[ -n "$REFUSE" ] && for argument; do
    case " $REFUSE " in *" $argument "*) echo "cc1: error: unrecognized option '$argument'" >&2; exit 1;; esac
done
case "$*" in *probe.c*) exec {real} $PREPEND "$@";; esac
echo "$@" >> "$CALLS"
while [ $# -gt 1 ]; do
    if [ "$1" = -o ]; then mkdir -p "$(dirname "$2")"; : > "$2"; fi
    shift
done
"""
NVCC = """#!/bin/sh
case "$*" in
    --version) echo "Cuda compilation tools, release ${VERSION:-13.0}, V13.0.88"; exit;;
    --dryrun*) echo '#$ LIBRARIES=  "-L/cuda/lib"' >&2; exit;;
    --list-gpu-arch) echo compute_80 compute_89 compute_90; exit;;
esac
echo nvcc "$@" >> "$CALLS"
[ -n "$FAIL" ] && { echo "layernorm.cu(1): error: $FAIL" >&2; exit 2; }
while [ $# -gt 1 ]; do
    if [ "$1" = -o ]; then : > "$2"; fi
    shift
done
"""


class Tree:
    """A copy of what setup.py reads, and a compiler that only pretends."""

    def __init__(self, folder):
        self.folder = folder
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, folder)
        ignore = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__", "shakespeare.txt")
        shutil.copytree(ROOT / "pyllmc", folder / "pyllmc", ignore=ignore)
        self.compiler = folder / "compiler"
        name, *options = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC"))
        real = shutil.which(name) or shutil.which("gcc") or shutil.which("clang")
        self.compiler.write_text(COMPILER.format(real=shlex.join([real, *options])))
        self.compiler.chmod(0o755)
        self.nvcc = folder / "cuda" / "bin" / "nvcc"
        self.nvcc.parent.mkdir(parents=True)
        self.nvcc.write_text(NVCC)
        self.nvcc.chmod(0o755)
        (self.nvcc.parent / "nvidia-smi").write_text('#!/bin/sh\n[ -n "$GPUS" ] && printf \'%b\' "$GPUS"\n')
        (self.nvcc.parent / "nvidia-smi").chmod(0o755)
        self.log = folder / "calls.txt"

    def run(self, *arguments, **environment):
        """Runs python with these arguments; environment variables that steer a build count only if given here."""
        inherited = {
            k: v for k, v in os.environ.items() if not k.startswith("PYLLMC_") and k not in ("CFLAGS", "LDFLAGS")
        }
        defaults = {"CC": str(self.compiler), "CALLS": str(self.log), "MAX_JOBS": "2", "PYLLMC_CUDA": "0"}
        environment = inherited | defaults | environment
        return subprocess.run(
            [sys.executable, *arguments],
            check=False,
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def build(self, **environment):
        """Builds; returns the report as {title: text}, and the compiler's calls as lists of words."""
        self.log.write_text("")
        result = self.run("setup.py", "build_ext", **environment)
        assert result.returncode == 0, result.stderr
        report = result.stderr[result.stderr.index("pyllmc build report\n") :].splitlines()[1:]
        return (
            {line[2:13].strip(): line[13:] for line in report},
            [shlex.split(line) for line in self.log.read_text().splitlines()],
        )


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return Tree(tmp_path_factory.mktemp("tree"))


def compiled(calls):
    """{module: its compiler flags}, of those calls that compile."""
    return {Path(call[call.index("-c") + 1]).stem: call for call in calls if "-c" in call}


def refusal(result):
    """The message of a build that stopped before it began, without pages around it."""
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    text = result.stderr.strip()
    assert text.startswith("pyllmc cannot be built: ") and len(text.splitlines()) <= 5, text
    assert "Cythonizing" not in result.stdout
    return text


def test_no_compiler(tree):
    text = refusal(tree.run("setup.py", "build_ext", CC="/nonexistent/cc"))
    assert "no working C compiler (/nonexistent/cc: No such file or directory)" in text
    for system, command in [("Debian", "apt-get install"), ("Fedora", "dnf install"), ("macOS", "xcode-select")]:
        assert any(system in line and command in line for line in text.splitlines())


def test_a_compiler_that_fails(tree):
    text = refusal(tree.run("setup.py", "build_ext", PREPEND="-include missing.h"))
    assert "no working C compiler" in text and "missing.h" in text.splitlines()[0]


def test_no_python_headers(tree):
    code = """
import runpy, sys, sysconfig
real = sysconfig.get_path
sysconfig.get_path = lambda name, *more: "/nonexistent" if name == "include" else real(name, *more)
sys.argv = ["setup.py", "build_ext"]
runpy.run_path("setup.py", run_name="__main__")
"""
    text = refusal(tree.run("-c", code))
    version = f"3.{sys.version_info.minor}"
    assert "Python's C headers (Python.h) are missing in /nonexistent" in text
    for command in (
        f"apt-get install python{version}-dev",
        f"dnf install python{version}-devel",
        "brew install python@",
    ):
        assert command in text


@pytest.mark.parametrize(
    ("module", "found", "wanted"), [("setuptools", "76.1", "setuptools>=77"), ("Cython", "3.0.11", "Cython>=3.0.12")]
)
def test_a_tool_that_is_too_old(tree, module, found, wanted):
    code = f"""
import runpy, sys, {module}
{module}.__version__ = {found!r}
sys.argv = ["setup.py", "build_ext"]
runpy.run_path("setup.py", run_name="__main__")
"""
    text = refusal(tree.run("-c", code))
    assert text == f"pyllmc cannot be built: {module} {found} is too old; python -m pip install '{wanted}'"


def test_a_processor_without_vectors(tree):
    text = refusal(tree.run("setup.py", "build_ext", PREPEND="-U__SSE2__ -U__ARM_NEON"))
    assert "SSE2" in text and "NEON" in text and platform.machine() in text


def test_the_default_build_and_its_report(tree):
    report, calls = tree.build(MAX_JOBS="1")
    flags = compiled(calls)
    assert set(flags) == ({"_baseline", "_avx2", "_avx512", "isa"} if ON_X86 else {"_baseline", "isa"})
    assert not any(flag.startswith("-m") for name in ("_baseline", "isa") for flag in flags[name])
    for call in flags.values():
        assert {"-ffp-contract=off", "-O3", "-fvisibility=hidden"} <= set(call)
        assert not {"-Ofast", "-ffast-math", "-march=native"} & set(call)
    if ON_X86:
        assert {"-mavx2", "-mfma"} <= set(flags["_avx2"]) and "-mavx512f" not in flags["_avx2"]
        assert report["ISA"].startswith("baseline, avx2, avx512;")
    assert report["OpenMP"] == "yes" and report["build"] == "release" and report["CUDA"].startswith("no: ")
    assert "left out" not in report


def test_no_conversion_that_calls_itself_where_all_that_is_inline_is_inlined(tree):
    """As Cython before 3.3 makes them; gcc refuses that. So integers of Python become Py_ssize_t and nothing else."""
    tree.build()
    sources = list(tree.folder.glob("build/cython/*/pyllmc/_ops/*.c"))
    assert sources
    for source in sources:
        found = re.findall(r"__pyx_\w+ = __Pyx_PyLong_As_\w+\(", source.read_text())
        assert not found, f"{source.name}: {found}"


def test_compiles_again_only_what_changed(tree):
    tree.build()
    _, calls = tree.build()
    assert calls == []
    _, calls = tree.build(PYLLMC_DEBUG="1")
    assert calls != []
    (tree.folder / "pyllmc" / "_ops" / "simd.h").touch()
    _, calls = tree.build(PYLLMC_DEBUG="1")
    assert "_baseline" in compiled(calls) and "isa" not in compiled(calls)


def test_without_openmp(tree):
    report, calls = tree.build(PYLLMC_NO_OPENMP="1")
    assert report["OpenMP"] == "no (PYLLMC_NO_OPENMP=1): the ops run on one thread"
    assert calls and not any("-fopenmp" in call for call in calls)
    report, calls = tree.build(REFUSE="-fopenmp")
    assert report["OpenMP"].startswith("no: OpenMP is missing, so the ops run on one thread.")
    assert not any("-fopenmp" in call for call in calls)


@pytest.mark.skipif(not ON_X86, reason="only x86-64 has more than one ISA module")
def test_a_compiler_that_lacks_flags(tree):
    report, calls = tree.build(REFUSE="-mavx512f -mavx512vl -std=c11")
    flags = compiled(calls)
    assert set(flags) == {"_baseline", "_avx2", "isa"}
    assert not any("-std=c11" in call for call in calls) and "-ffp-contract=off" in flags["_avx2"]
    assert report["ISA"].startswith("baseline, avx2;")
    assert report["left out"] == "avx512: cc1: error: unrecognized option '-mavx512f'"
    assert not list(tree.folder.glob("build/lib*/pyllmc/_ops/_avx512*"))


def test_debug_and_sanitizers(tree):
    report, calls = tree.build(PYLLMC_DEBUG="1", PYLLMC_SANITIZE="address,undefined")
    for call in compiled(calls).values():
        assert {"-O1", "-g", "-fsanitize=address,undefined"} <= set(call) and call.index("-O1") > call.index("-c")
    assert all("-fsanitize=address,undefined" in call for call in calls)
    assert report["build"] == "debug (PYLLMC_DEBUG=1)"


def test_one_architecture_of_a_universal_mac(tree):
    code = """
import platform, runpy
platform.machine = lambda: "arm64"
names = runpy.run_path("setup.py")
print(*names["one_architecture"](["clang", "-arch", "arm64", "-arch", "x86_64", "-O2", "x86_64"]))
print(*names["ISA_FLAGS"])
"""
    result = tree.run("-c", code)
    assert result.stdout.splitlines() == ["clang -arch arm64 -O2 x86_64", "baseline"], result.stderr


def test_another_compiler_where_pythons_own_is_not_here(tree):
    code = """
import os, runpy, sys, sysconfig
del os.environ["CC"]
sysconfig.get_config_vars()["CC"] = "/nonexistent/cc"
sys.argv = ["setup.py", "build_ext"]
runpy.run_path("setup.py", run_name="__main__")
"""
    folder = tree.folder / "bin"
    folder.mkdir()
    (folder / "clang").symlink_to(tree.compiler)
    (folder / "gcc").write_text("#!/bin/sh\nexit 1\n")
    (folder / "gcc").chmod(0o755)
    tree.log.write_text("")
    result = tree.run("-c", code, PATH=f"{folder}{os.pathsep}{os.environ['PATH']}")
    assert result.returncode == 0, result.stderr
    assert "\n  compiler   clang" in result.stderr
    assert "_baseline" in compiled([line.split() for line in tree.log.read_text().splitlines()])


# ---- CUDA ------------------------------------------------------------------------------------------------------------


def build_with_cuda(tree, **environment):
    """A build that finds the pretended nvcc and nvidia-smi; the report's line, and nvcc's calls."""
    path = f"{tree.nvcc.parent}{os.pathsep}{os.environ['PATH']}"
    defaults = {"PYLLMC_CUDA": "auto", "CUDA_HOME": str(tree.nvcc.parent.parent), "PATH": path}
    defaults["CXX"] = str(tree.compiler)
    report, calls = tree.build(**(defaults | environment))
    return report["CUDA"], [call for call in calls if call[0] == "nvcc"], calls


def gencodes(call):
    return [word.removeprefix("-gencode=arch=") for word in call if word.startswith("-gencode")]


def test_cuda_is_built_for_all_gpus_where_there_is_none(tree):
    report, nvcc, calls = build_with_cuda(tree)
    assert report == "nvcc 13.0, for sm_80, sm_89, sm_90a"
    sources = {path.relative_to(ROOT) for path in (ROOT / "pyllmc" / "_cuda").glob("*.cu")}
    assert {Path(call[call.index("-c") + 1]) for call in nvcc} == sources
    wanted = ["compute_80,code=sm_80", "compute_89,code=sm_89", "compute_90a,code=sm_90a", "compute_80,code=compute_80"]
    assert all(gencodes(call) == wanted for call in nvcc)
    assert not any("fast" in word for call in nvcc for word in call)
    (link,) = [call for call in calls if any("_cuda/ops." in word and word.endswith(".so") for word in call)]
    assert {"-lcudart_static", "-L/cuda/lib"} <= set(link) and not any(word.startswith("-lcublas") for word in link)
    assert sum(word.endswith(".o") for word in link) == len(nvcc) + 1
    _, nvcc, _ = build_with_cuda(tree)
    assert nvcc == [], "what was compiled is compiled again"


def test_cuda_is_built_for_the_gpus_here_or_those_asked_for(tree):
    report, nvcc, _ = build_with_cuda(tree, GPUS="9.0\\n8.6\\n7.5\\n9.0\\n")
    assert report.endswith("for sm_86, sm_90a")
    assert gencodes(nvcc[0]) == ["compute_86,code=sm_86", "compute_90a,code=sm_90a"]
    report, nvcc, _ = build_with_cuda(tree, GPUS="8.6\\n", PYLLMC_CUDA_ARCHS="90a,120")
    assert report.endswith("for sm_90a, sm_120") and len(gencodes(nvcc[0])) == 2


def test_without_cuda_one_line_says_why(tree):
    for environment, why in [
        ({"PYLLMC_CUDA": "0"}, "PYLLMC_CUDA=0"),
        ({"VERSION": "12.3"}, "nvcc 12.3 is older than 12.4"),
        ({"FAIL": "unsupported compiler", "PYLLMC_CUDA_ARCHS": "80"}, "layernorm.cu(1): error: unsupported compiler"),
    ]:
        report, _, calls = build_with_cuda(tree, **environment)
        assert report == f"no: {why}; the ops run on the CPU"
        assert not any("_cuda" in word and word.endswith(".so") for call in calls for word in call)


def test_cuda_that_is_demanded_and_fails_stops_the_build(tree):
    settings = {"PYLLMC_CUDA": "1", "CUDA_HOME": str(tree.nvcc.parent.parent), "FAIL": "no such thing"}
    result = tree.run("setup.py", "build_ext", "--force", **settings)
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert "pyllmc cannot be built with CUDA (PYLLMC_CUDA=1): layernorm.cu(1): error: no such thing" in result.stderr
