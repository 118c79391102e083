"""Builds the Cython extensions of pyllmc; everything else about the package stands in pyproject.toml.

The ops in pyllmc/_ops are compiled once per instruction set (ISA): the same sources, each with its own flags.
pyllmc/_ops/isa.pyx, compiled without ISA flags, picks one at import.

Environment:
    PYLLMC_NO_OPENMP=1   build without threads
    PYLLMC_DEBUG=1       -O1 -g; PYLLMC_SANITIZE=address,undefined adds -fsanitize
    PYLLMC_ANNOTATE=1    Cython's annotated HTML beside the generated C in build/cython
    MAX_JOBS=n           compile n extensions at a time (default: the number of processors)
"""

import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from Cython.Build import cythonize

DEBUG = os.environ.get("PYLLMC_DEBUG") == "1"
SANITIZE = os.environ.get("PYLLMC_SANITIZE", "")
JOBS = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)

X86_64 = platform.machine().lower() in ("x86_64", "amd64")
ISA_FLAGS = {"baseline": []}
if X86_64:
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma"]
    ISA_FLAGS["avx512"] = ["-mavx2", "-mfma", "-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq"]

# -ffp-contract=off: a product and a sum fuse only where the source says vfma. Never -ffast-math: it sets flush-to-zero
# for the whole process at import, and breaks infinities.
FLAGS = ["-std=c11", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden",
         "-Wno-unused-function", "-Wno-psabi"]
FLAGS += ["-O1", "-g"] if DEBUG else ["-O3", "-g0"]
SANITIZE_FLAGS = [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer"] if SANITIZE else []

# The kernels work on plain pointers, so the checks that Cython makes on Python's own sequences cost nothing: they stay.
DIRECTIVES = {"language_level": 3, "cdivision": True, "binding": True}

INSTALL_HINTS = {
    "compiler": "a C compiler is missing. Install one: Debian/Ubuntu `sudo apt-get install gcc`, "
                "Fedora `sudo dnf install gcc`, macOS `xcode-select --install`.",
    "headers": "Python's C headers (Python.h) are missing. Install them: Debian/Ubuntu `sudo apt-get install python3-dev`, "
               "Fedora `sudo dnf install python3-devel`, macOS `brew install python`.",
    "openmp": "OpenMP is missing, so the ops will run on one thread. To have threads: Debian/Ubuntu `sudo apt-get install "
              "libgomp1`, Fedora `sudo dnf install libgomp`, macOS `brew install libomp`; then install again.",
}


def extensions():
    """One extension per ISA, and the one that picks among them."""
    here = Path("pyllmc/_ops")
    depends = [str(path) for pattern in ("*.pxi", "*.pxd", "*.h") for path in sorted(here.glob(pattern))]
    common = dict(include_dirs=[str(here)], depends=depends)
    found = [Extension(f"pyllmc._ops._{isa}", [f"pyllmc/_ops/_{isa}.pyx"],
                       extra_compile_args=FLAGS + flags + SANITIZE_FLAGS, extra_link_args=SANITIZE_FLAGS, **common)
             for isa, flags in ISA_FLAGS.items()]
    return found + [Extension("pyllmc._ops.isa", ["pyllmc/_ops/isa.pyx"], extra_compile_args=FLAGS)]


class BuildExt(build_ext):
    """build_ext that first says what is missing, finds OpenMP, compiles in parallel, and reports once at the end."""

    def finalize_options(self):
        super().finalize_options()
        self.parallel = self.parallel or JOBS

    def build_extensions(self):
        self.require("compiler", "int main(void) { return 0; }\n", [])
        include = sysconfig.get_path("include")
        self.require("headers", "#include <Python.h>\nint main(void) { return 0; }\n", [f"-I{include}"])
        compile_flags, link_flags = self.openmp()
        for extension in self.extensions:
            if extension.name != "pyllmc._ops.isa":
                extension.extra_compile_args += compile_flags
                extension.extra_link_args += link_flags
        super().build_extensions()
        self.report(bool(link_flags))

    def compiles(self, source, compile_flags, link_flags=()):
        """Whether the compiler that will build the extensions compiles and links this program."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "probe.c")
            path.write_text(source)
            command = [*self.compiler.compiler, *compile_flags, str(path), "-o", str(Path(folder, "probe")), *link_flags]
            try:
                return subprocess.run(command, capture_output=True).returncode == 0
            except OSError:
                return False

    def require(self, what, source, flags):
        if not self.compiles(source, flags):
            raise SystemExit(f"\npyllmc cannot be built: {INSTALL_HINTS[what]}\n")

    def openmp(self):
        """Flags to compile and to link OpenMP programs with; empty where there is no OpenMP."""
        if os.environ.get("PYLLMC_NO_OPENMP") == "1":
            return [], []
        source = "#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n"
        candidates = [(["-fopenmp"], ["-fopenmp"])]
        if sys.platform == "darwin":
            for prefix in (os.environ.get("HOMEBREW_PREFIX", "/opt/homebrew"), "/usr/local"):
                root = f"{prefix}/opt/libomp"
                candidates.append((["-Xpreprocessor", "-fopenmp", f"-I{root}/include"],
                                   [f"-L{root}/lib", "-lomp", f"-Wl,-rpath,{root}/lib"]))
        for compile_flags, link_flags in candidates:
            if self.compiles(source, compile_flags, link_flags):
                return compile_flags, link_flags
        print(f"\npyllmc: {INSTALL_HINTS['openmp']}\n", file=sys.stderr)
        return [], []

    def report(self, openmp):
        lines = ["pyllmc build report",
                 f"  compiler   {' '.join(self.compiler.compiler)}",
                 f"  ISA        {', '.join(ISA_FLAGS)} (the best one that the CPU runs is chosen at import)",
                 f"  OpenMP     {'yes' if openmp else 'no: one thread'}",
                 "  CUDA       no: this version computes on the CPU",
                 f"  build      {'debug (PYLLMC_DEBUG=1)' if DEBUG else 'release'}"]
        print("\n".join(lines), file=sys.stderr, flush=True)


setup(
    ext_modules=cythonize(extensions(), compiler_directives=DIRECTIVES, build_dir="build/cython", nthreads=JOBS,
                          annotate=os.environ.get("PYLLMC_ANNOTATE") == "1",
                          show_all_warnings=False),
    cmdclass={"build_ext": BuildExt},
)
