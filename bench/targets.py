"""The architectures that Triton kernels are compiled for, known without Triton."""

# Architecture -> what ptxas calls it, and the shared memory that one block may have, in bytes.
TARGETS = {"80": ("sm_80", 163 << 10), "90": ("sm_90a", 227 << 10), "100": ("sm_100a", 227 << 10)}
