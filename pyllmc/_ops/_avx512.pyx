# The ops compiled with avx512's flags (setup.py).
# Never imported before pyllmc._ops.isa has seen that the CPU can run it.
include "ops.pxi"
