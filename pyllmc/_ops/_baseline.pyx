# The ops compiled with no ISA flags: SSE2 on x86-64, NEON on aarch64. Every CPU of the architecture can run it.
include "ops.pxi"
