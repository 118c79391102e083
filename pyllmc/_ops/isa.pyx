"""Picks the ISA module of the CPU backend. Compiled without ISA flags, so that every CPU can run it.

Called by pyllmc._ops at import, by `python -m pyllmc info` and by tests. A module is loaded only when this CPU can
execute it: its code, start-up code included, may use any instruction of its ISA.
"""

import importlib.util
import os

cdef extern from *:
    """
    #if defined(__x86_64__) && defined(__GNUC__)
    /* the compiler's run-time asks the OS too whether it saves the registers */
    static int cpu_has_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
    static int cpu_has_avx512(void)
    {
        return cpu_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl")
            && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
    }
    #else
    static int cpu_has_avx2(void) { return 0; }
    static int cpu_has_avx512(void) { return 0; }
    #endif
    """
    int cpu_has_avx2()
    int cpu_has_avx512()

ORDER = ("baseline", "avx2", "avx512")     # worst first


def _built():
    return tuple(name for name in ORDER if importlib.util.find_spec("pyllmc._ops._" + name) is not None)


RUNNABLE = ("baseline",) + (("avx2",) if cpu_has_avx2() else ()) + (("avx512",) if cpu_has_avx512() else ())
BUILT = _built()
AVAILABLE = tuple(name for name in ORDER if name in BUILT and name in RUNNABLE)


def choose():
    """The name of the module to use: PYLLMC_ISA where it is set, else the best that is built and that this CPU runs."""
    forced = os.environ.get("PYLLMC_ISA", "")
    if not forced:
        return AVAILABLE[-1]
    if forced in AVAILABLE:
        return forced
    why = "is unknown" if forced not in ORDER else "is not built" if forced not in BUILT else "does not run on this CPU"
    raise ImportError(f"PYLLMC_ISA={forced} {why}; available here: {', '.join(AVAILABLE)}")


def load(name):
    """The ISA module called `name`, with this process's thread limits applied to it."""
    if name not in AVAILABLE:
        raise ImportError(f"the {name} ops cannot be loaded; available here: {', '.join(AVAILABLE)}")
    module = importlib.import_module("pyllmc._ops._" + name)
    module.limit_threads(1 if _forked else container_cpus())
    return module


def container_cpus():
    """Processors that the container's quota pays for, rounded up; 0 without one, or where OMP_NUM_THREADS is set."""
    if os.environ.get("OMP_NUM_THREADS"):
        return 0
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
        return 0 if quota == "max" else max(1, -(-int(quota) // int(period)))
    except (OSError, ValueError):
        return 0


_forked = False


def _after_fork():
    """OpenMP's worker threads do not survive a fork, and waiting for them hangs: a child computes on one thread."""
    global _forked
    _forked = True
    import sys
    for name in ORDER:
        module = sys.modules.get("pyllmc._ops._" + name)
        if module is not None:
            module.limit_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
