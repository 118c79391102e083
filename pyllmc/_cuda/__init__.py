"""The CUDA backend: on this version, its honest absence.

backends.py reads AVAILABLE, and shows REASON to whoever asks for "cuda".
"""

AVAILABLE = False
REASON = "this version of pyllmc has no CUDA kernels yet; the CPU backend does everything"
