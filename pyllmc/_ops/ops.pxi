# The CPU backend: every op, in the order in which a training step meets them.
# Included by _baseline.pyx, _avx2.pyx and _avx512.pyx, which differ in compiler flags alone.

include "common.pxi"
include "encoder.pxi"
include "layernorm.pxi"
include "gelu.pxi"
include "gemm.pxi"
include "matmul.pxi"
include "attention.pxi"
include "attention_backward.pxi"
include "residual.pxi"
include "softmax.pxi"
include "classifier.pxi"
include "adamw.pxi"
include "probes.pxi"

NAME = PYLLMC_ISA_NAME.decode()
VECTOR_WIDTH = <int> W
OPENMP = bool(PYLLMC_OPENMP)
