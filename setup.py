"""Builds the Cython extensions of pyllmc; everything else about the package stands in pyproject.toml.

The ops in pyllmc/_ops are compiled once per instruction set (ISA): the same sources, each with its own flags.
pyllmc/_ops/isa.pyx, compiled without ISA flags, picks one at import. Where nvcc is, the kernels in pyllmc/_cuda are
compiled too and linked, with CUDA's runtime, into one extension; without nvcc the package computes on the CPU.

Environment:
    CC=clang             another compiler than the one that Python was built with
    MAX_JOBS=n           compile n extensions at a time (default: the number of processors)
    PYLLMC_NO_OPENMP=1   build without threads
    PYLLMC_CUDA=0|1|auto without CUDA; with it, or stop; with it if it can be built (the default)
    PYLLMC_CUDA_ARCHS=.. "90a" or "80 90a": the GPUs to build for. Default: those of this machine; where it has none,
                         80, 89, 90a, 100 and 120 as far as nvcc knows them, and PTX for all others from 80 on
    CUDA_HOME=/folder    where nvcc is looked for before PATH
    PYLLMC_DEBUG=1       -O1 -g
    PYLLMC_SANITIZE=...  -fsanitize=..., for example address,undefined; to run such a build with gcc:
                         LD_PRELOAD="$(gcc -print-file-name=libasan.so)" ASAN_OPTIONS=detect_leaks=0 python ...
    PYLLMC_ANNOTATE=1    Cython's annotated HTML beside the C that it generates in build/cython
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

# setuptools comes first: it provides the distutils that Cython imports
# isort: split
import Cython
from Cython.Build import cythonize

DEBUG = os.environ.get("PYLLMC_DEBUG") == "1"
SANITIZE = os.environ.get("PYLLMC_SANITIZE", "")
JOBS = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)

# The flags of each ISA module, and a program that shows whether the compiler knows the ISA.
ISA_FLAGS = {"baseline": []}
ISA_PROGRAMS = {
    "baseline": "#if !(defined(__SSE2__) || (defined(__ARM_NEON) && defined(__aarch64__)))\n"
    "#error pyllmc needs SSE2 or NEON\n#endif\nint main(void) { return 0; }\n",
}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma"]
    ISA_FLAGS["avx512"] = [*ISA_FLAGS["avx2"], "-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq"]
    ISA_PROGRAMS["avx2"] = (
        "#include <immintrin.h>\nint main(void) { __m256 x = _mm256_setzero_ps();"
        " return _mm256_movemask_ps(_mm256_fmadd_ps(x, x, x)); }\n"
    )
    ISA_PROGRAMS["avx512"] = (
        "#include <immintrin.h>\nint main(void) { __m512 x = _mm512_setzero_ps();"
        " return _mm512_cmp_ps_mask(_mm512_fmadd_ps(x, x, x), x, _CMP_LT_OQ); }\n"
    )

# -ffp-contract=off: a product and a sum fuse only where the source says vfma, so every compiler gives the same bits.
# Never -ffast-math: it sets flush-to-zero for the whole process at import, and breaks infinities.
FLAGS = ["-std=c11", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
# The source says what is inline, and nothing else is: the sums of a product's tile stay in registers only where the
# tile is compiled into a function of its own.
FLAGS += ["-fno-inline-functions", "-fno-inline-functions-called-once"]
FLAGS += ["-DCYTHON_INLINE=inline __attribute__((always_inline))"]
FLAGS += ["-Wno-unused-function", "-Wno-psabi"]
FLAGS += ["-O1", "-g"] if DEBUG else ["-O3", "-g0"]
SANITIZE_FLAGS = [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer"] if SANITIZE else []

# The kernels on a GPU: IEEE arithmetic in which products and sums may fuse; an approximation is named where it is used.
CUDA_WANTED = os.environ.get("PYLLMC_CUDA", "auto")
CUDA_FOLDER = Path("pyllmc/_cuda")
CUDA_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]
CUDA_FLAGS += ["-lineinfo"] if DEBUG else []
CXX_FLAGS = ["-std=c++17", "-fvisibility=hidden", *(["-O1", "-g"] if DEBUG else ["-O2", "-g0"])]
CUDA_ARCHS, CUDA_PTX = ("80", "89", "90a", "100", "120"), "80"
CUDA_OLDEST = (12, 4)
CUDA_LIBRARIES = ["cudart_static", "rt", "dl", "pthread"]

# The kernels work on plain pointers, so the checks that Cython makes on Python's own sequences cost nothing: they stay.
DIRECTIVES = {"language_level": 3, "cdivision": True, "binding": True}

VERSION = f"3.{sys.version_info.minor}"
PROGRAM = "#include <math.h>\nint main(void) { return 0; }\n"
PYTHON_PROGRAM = "#include <Python.h>\nint main(void) { return 0; }\n"
OPENMP_PROGRAM = "#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n"

SYSTEMS = ("Debian, Ubuntu", "Fedora", "macOS")
MISSING = {
    "compiler": "there is no working C compiler",
    "headers": "Python's C headers (Python.h) are missing",
    "openmp": "OpenMP is missing",
}
INSTALL = {
    "compiler": ("sudo apt-get install build-essential", "sudo dnf install gcc", "xcode-select --install"),
    "headers": (
        f"sudo apt-get install python{VERSION}-dev",
        f"sudo dnf install python{VERSION}-devel",
        f"brew install python@{VERSION}",
    ),
    "openmp": (
        "sudo apt-get install build-essential  (with clang: libomp-dev)",
        "sudo dnf install libgomp  (with clang: libomp-devel)",
        "brew install libomp",
    ),
}


def require_tools():
    """Stops where setuptools or Cython are older than pyproject.toml asks; pip looks at that, `python setup.py` not."""
    with open("pyproject.toml", "rb") as file:
        wanted = tomllib.load(file)["build-system"]["requires"]
    for name, oldest in (re.match(r"(\w+)>=([\d.]+)", each).groups() for each in wanted):
        found = sys.modules[name].__version__
        if [*map(int, re.findall(r"\d+", found)[:3])] < [*map(int, oldest.split("."))]:
            raise SystemExit(
                f"\npyllmc cannot be built: {name} {found} is too old; python -m pip install '{name}>={oldest}'\n"
            )


def how_to_install(what, detail):
    """One line that says what is missing, then the command that installs it on each system."""
    commands = [f"    {system:16}{command}" for system, command in zip(SYSTEMS, INSTALL[what], strict=True)]
    return "\n".join([MISSING[what] + detail, *commands])


def one_architecture(command):
    """A compiler command without the -arch of the other kind of Mac: a universal Python names both, but ISA flags and
    Homebrew's libraries are of one."""
    others = {"arm64", "x86_64"} - {platform.machine()}
    kept = []
    for word in command:
        if word in others and kept[-1:] == ["-arch"]:
            kept.pop()
        else:
            kept.append(word)
    return kept


def isa_of(extension):
    """The "avx2" of pyllmc._ops._avx2; a name that is no ISA's for the module that picks."""
    return extension.name.rpartition(".")[2].removeprefix("_")


def extensions():
    """One extension per ISA, and the one that picks among them."""
    here = Path("pyllmc/_ops")
    depends = [str(path) for pattern in ("*.pxi", "*.pxd", "*.h") for path in sorted(here.glob(pattern))]
    ops = [
        Extension(f"pyllmc._ops._{isa}", [f"pyllmc/_ops/_{isa}.pyx"], include_dirs=[str(here)], depends=depends)
        for isa in ISA_FLAGS
    ]
    depends = [str(path) for pattern in ("*.pxi", "*.pxd", "*.h") for path in sorted(CUDA_FOLDER.glob(pattern))]
    cuda = Extension(
        "pyllmc._cuda.ops",
        [str(CUDA_FOLDER / "ops.pyx")],
        include_dirs=[str(CUDA_FOLDER)],
        libraries=CUDA_LIBRARIES,
        depends=depends,
        language="c++",
    )
    return [*ops, cuda, Extension("pyllmc._ops.isa", ["pyllmc/_ops/isa.pyx"])]


def output(*command):
    """What a command prints, errors too; None where it cannot be run or fails."""
    try:
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout


class Cuda:
    """nvcc and what it is asked for: `error` says why there will be no CUDA backend, "" where there will be one."""

    def __init__(self):
        self.error, self.archs, self.version = "", [], None
        home = os.environ.get("CUDA_HOME", "")
        self.nvcc = shutil.which("nvcc", path=str(Path(home, "bin"))) if home else None
        self.nvcc = self.nvcc or shutil.which("nvcc")
        if CUDA_WANTED == "0":
            self.error = "PYLLMC_CUDA=0"
        elif self.nvcc is None:
            self.error = "nvcc was not found on PATH or in CUDA_HOME"
        else:
            self.ask()

    def ask(self):
        """The version of nvcc, the folders of its libraries, and the GPUs to build for."""
        text = output(self.nvcc, "--version") or ""
        match = re.search(r"release (\d+)\.(\d+)", text)
        if match is None:
            self.error = f"{self.nvcc} --version fails"
            return
        self.version = tuple(map(int, match.groups()))
        if self.version < CUDA_OLDEST:
            self.error = "nvcc {}.{} is older than {}.{}".format(*self.version, *CUDA_OLDEST)
            return
        line = re.search(r"^#\$ LIBRARIES=(.*)$", output(self.nvcc, "--dryrun", "x.cu") or "", re.MULTILINE)
        self.library_dirs = re.findall(r'"?-L([^"\s]+)"?', line[1]) if line else []
        self.archs = os.environ.get("PYLLMC_CUDA_ARCHS", "").replace(",", " ").split() or self.gpus_here()
        self.gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in self.archs]
        if not self.archs:
            known = (output(self.nvcc, "--list-gpu-arch") or "").split()
            self.archs = [arch for arch in CUDA_ARCHS if f"compute_{arch.rstrip('a')}" in known]
            self.gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in self.archs]
            self.gencode.append(f"-gencode=arch=compute_{CUDA_PTX},code=compute_{CUDA_PTX}")

    def gpus_here(self):
        """The architectures of this machine's GPUs, without those that have no bfloat16."""
        text = output("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader") or ""
        found = sorted({int(match[1]) * 10 + int(match[2]) for match in re.finditer(r"^(\d+)\.(\d)$", text, re.M)})
        return ["90a" if arch == 90 else str(arch) for arch in found if arch >= 80]

    def command(self):
        return [self.nvcc, *CUDA_FLAGS, *self.gencode]

    def compile(self, folder, force):
        """The kernels' object files, made anew where a source is newer; sets `error` where nvcc fails."""
        headers = [path for pattern in ("*.h", "*.cuh") for path in CUDA_FOLDER.glob(pattern)]
        newest_header = max(path.stat().st_mtime for path in headers)
        folder.mkdir(parents=True, exist_ok=True)

        def compile_one(source):
            target = folder / f"{source.stem}.o"
            newest = max(newest_header, source.stat().st_mtime)
            if not force and target.exists() and target.stat().st_mtime > newest:
                return ""
            command = [*self.command(), "-c", str(source), "-o", str(target)]
            print(*command, flush=True)
            done = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace")
            if done.returncode == 0:
                return ""
            target.unlink(missing_ok=True)
            text = done.stderr + done.stdout
            lines = [line for line in text.splitlines() if "error" in line] or text.splitlines()
            return lines[0] if lines else f"{self.nvcc}: exit status {done.returncode}"

        sources = sorted(CUDA_FOLDER.glob("*.cu"))
        with ThreadPoolExecutor(JOBS) as pool:
            errors = [error for error in pool.map(compile_one, sources) if error]
        self.error = errors[0] if errors else ""
        return [str(folder / f"{source.stem}.o") for source in sources]

    def report(self):
        if self.error:
            return f"no: {self.error}; the ops run on the CPU"
        return "nvcc {}.{}, for {}".format(*self.version, ", ".join(f"sm_{arch}" for arch in self.archs))


class Build(build):
    """Compiles before it copies, so that what is missing is the first thing said."""

    sub_commands = sorted(build.sub_commands, key=lambda command: command[0] != "build_ext")


class BuildExt(build_ext):
    """build_ext that says what is missing, asks the compiler what it can, compiles in parallel, reports at the end."""

    def finalize_options(self):
        super().finalize_options()
        self.parallel = self.parallel or JOBS

    def run(self):
        super().run()
        gone = [f"pyllmc._ops._{isa}" for isa in self.left_out] + (["pyllmc._cuda.ops"] if self.cuda.error else [])
        for name in gone:  # of an earlier build, with other settings
            Path(self.get_ext_fullpath(name)).unlink(missing_ok=True)
        self.report()

    def build_extensions(self):
        if self.compiler.compiler_type != "unix":
            raise SystemExit("\npyllmc cannot be built: it needs gcc or clang; on Windows, use it in WSL\n")
        if sys.platform == "darwin" and "ARCHFLAGS" not in os.environ:
            self.change_commands(one_architecture)
        self.require_compiler()
        self.require_headers_and_vectors()

        self.configure()
        settings, text = Path(self.build_temp, "settings.txt"), self.settings()
        # What was compiled with other settings is not up to date, whatever its date says.
        self.force = self.force or not settings.exists() or settings.read_text() != text
        self.compile_kernels()
        self.generate_c()
        super().build_extensions()
        settings.write_text(text)

    def configure(self):
        """Gives each extension the flags that this compiler takes."""
        flags = self.accepted(FLAGS)
        self.cuda = Cuda()
        self.threads, (compile_flags, link_flags) = self.openmp()
        self.left_out = self.leave_out_isas(flags)
        for extension in self.extensions:
            isa = isa_of(extension)
            if extension.language == "c++":
                extension.extra_compile_args = CXX_FLAGS
                continue
            extension.extra_compile_args = flags + SANITIZE_FLAGS
            extension.extra_link_args = SANITIZE_FLAGS
            if isa in ISA_FLAGS:
                extension.extra_compile_args = flags + ISA_FLAGS[isa] + SANITIZE_FLAGS + compile_flags
                extension.extra_link_args = SANITIZE_FLAGS + link_flags

    def compile_kernels(self):
        """nvcc's part: the CUDA extension gets the kernels' objects, or is left out."""
        cuda = next(extension for extension in self.extensions if extension.language == "c++")
        if not self.cuda.error:
            cuda.extra_objects = self.cuda.compile(Path(self.build_temp, "cuda"), self.force)
            cuda.library_dirs = self.cuda.library_dirs
            cuda.depends = [*cuda.depends, *cuda.extra_objects]
        if self.cuda.error:
            if CUDA_WANTED == "1":
                raise SystemExit(f"\npyllmc cannot be built with CUDA (PYLLMC_CUDA=1): {self.cuda.error}\n")
            self.extensions.remove(cuda)

    def generate_c(self):
        """Cython's part: the extensions' sources become C and C++ files."""
        generated = cythonize(
            [
                Extension(extension.name, extension.sources, depends=extension.depends, language=extension.language)
                for extension in self.extensions
            ],
            compiler_directives=DIRECTIVES,
            build_dir=f"build/cython/{Cython.__version__}",
            nthreads=JOBS,
            annotate=os.environ.get("PYLLMC_ANNOTATE") == "1",
        )
        for extension, with_c in zip(self.extensions, generated, strict=True):
            extension.sources = with_c.sources

    def settings(self):
        """All that decides what the compiler makes of a source, as text."""
        of_extensions = [(each.sources, each.extra_compile_args, each.extra_link_args) for each in self.extensions]
        nvcc = [] if self.cuda.error else self.cuda.command()
        return repr([self.compiler.compiler_so, self.compiler.linker_so, nvcc, *of_extensions])

    def error(self, source, compile_flags, link_flags=()):
        """Why the compiler that will build the extensions cannot build this program; "" where it can."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "probe.c")
            path.write_text(source)
            command = [*self.compiler.compiler, *compile_flags, str(path), "-o", str(Path(folder, "probe"))]
            command += [*os.environ.get("LDFLAGS", "").split(), *link_flags]
            try:
                done = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace")
            except OSError as error:
                return f"{command[0]}: {error.strerror}"
        if done.returncode == 0:
            return ""
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        return lines[0].replace(folder + os.sep, "") if lines else f"{command[0]}: exit status {done.returncode}"

    def change_commands(self, change):
        """Replaces each of the compiler's commands, a list of words, by what `change` makes of it."""
        for name in ("compiler", "compiler_so", "linker_so"):
            self.compiler.set_executable(name, change(getattr(self.compiler, name)))

    def require_compiler(self):
        """Python's own compiler, or the one that CC names; where neither is there, gcc or clang."""
        error = self.error(PROGRAM, [])
        if error and "CC" not in os.environ:
            for other in filter(shutil.which, ("gcc", "clang")):
                self.change_commands(lambda command, other=other: [other, *command[1:]])
                if not self.error(PROGRAM, []):
                    return
        if error:
            raise SystemExit(
                f"\npyllmc cannot be built: {how_to_install('compiler', f' ({error}). Install one:')}\n"
                "or name one that is there, as in: CC=clang pip install .\n"
            )

    def require_headers_and_vectors(self):
        include = sysconfig.get_path("include")
        if self.error(PYTHON_PROGRAM, [f"-I{include}"]):
            raise SystemExit(
                f"\npyllmc cannot be built: {how_to_install('headers', f' in {include}. Install them:')}\n"
            )
        if self.error(ISA_PROGRAMS["baseline"], []):
            raise SystemExit(
                "\npyllmc cannot be built: it computes with SSE2, AVX2 or AVX-512 on x86-64 and with NEON "
                f"on aarch64, and the compiler's target ({platform.machine()}) has none of them\n"
            )

    def accepted(self, flags):
        """Those of the flags that this compiler takes."""
        return flags if not self.error(PROGRAM, flags) else [flag for flag in flags if not self.error(PROGRAM, [flag])]

    def openmp(self):
        """What to say about OpenMP, and the flags to compile and to link with it: none where there is none."""
        if os.environ.get("PYLLMC_NO_OPENMP") == "1":
            return "no (PYLLMC_NO_OPENMP=1): the ops run on one thread", ([], [])
        candidates = [(["-fopenmp"], ["-fopenmp"])]
        if sys.platform == "darwin":
            for prefix in (os.environ.get("HOMEBREW_PREFIX", "/opt/homebrew"), "/usr/local"):
                root = f"{prefix}/opt/libomp"
                compile_flags = ["-Xpreprocessor", "-fopenmp", f"-I{root}/include"]
                candidates.append((compile_flags, [f"-L{root}/lib", "-lomp", f"-Wl,-rpath,{root}/lib"]))
        for compile_flags, link_flags in candidates:
            if not self.error(OPENMP_PROGRAM, compile_flags, link_flags):
                return "yes", (compile_flags, link_flags)
        no = "no: " + how_to_install("openmp", ", so the ops run on one thread. To have threads, install again after:")
        return no, ([], [])

    def leave_out_isas(self, flags):
        """Drops the ISA modules that this compiler cannot build, and returns {ISA: why}."""
        errors = {isa: self.error(ISA_PROGRAMS[isa], flags + isa_flags) for isa, isa_flags in ISA_FLAGS.items()}
        left_out = {isa: error for isa, error in errors.items() if error}
        self.extensions = [extension for extension in self.extensions if isa_of(extension) not in left_out]
        return left_out

    def report(self):
        """One report, the last thing said; `python -m pyllmc info` tells the same of the built package."""
        built = [isa for isa in ISA_FLAGS if isa not in self.left_out]
        lines = [
            "pyllmc build report",
            f"  compiler   {' '.join(self.compiler.compiler_so)}",
            f"  flags      {' '.join(self.extensions[-1].extra_compile_args)}",
            f"  ISA        {', '.join(built)}; the best one that the processor runs is chosen at import",
        ]
        lines += [f"  left out   {isa}: {why}" for isa, why in self.left_out.items()]
        lines += [
            f"  OpenMP     {self.threads}",
            f"  CUDA       {self.cuda.report()}",
            f"  build      {'debug (PYLLMC_DEBUG=1)' if DEBUG else 'release'}",
        ]
        print("\n".join(lines), file=sys.stderr, flush=True)


if __name__ == "__main__":
    require_tools()
    setup(ext_modules=extensions(), cmdclass={"build": Build, "build_ext": BuildExt})
