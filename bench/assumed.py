"""What ``bench.predict`` takes for granted of a GPU: every figure of the model, and where it comes from."""

from __future__ import annotations

GUIDE = "CUDA C++ Programming Guide, throughput of native arithmetic instructions"
LIMITS = "CUDA C++ Programming Guide, technical specifications per compute capability"
PAPER = "NVIDIA A100 and H100 architecture whitepapers"
MICRO = "published microbenchmarks (arXiv 2402.13499), about"
# What a prediction rests on: name -> value on 8.0 and on 9.0, unit, source. Rates are of one SM.
ASSUMED = {
    "processors": (108, 132, "", PAPER),
    "clock": (1.41e9, 1.755e9, "cycles/s", "boost clock of A100; usual clock of H100 and H200 under load"),
    "ceiling 16": (2.6e14, 7.9e14, "FLOP/s", "assumed of large products, on A100 and H200"),
    "ceiling tf32": (1.3e14, 3.95e14, "FLOP/s", "assumed: half of that for 16 bits"),
    "ceiling bandwidth": (1.75e12, 4.3e12, "bytes/s", "assumed of large copies, on A100 80 GB and H200"),
    "matrix 16": (1024, 2048, "multiply-adds/cycle", PAPER),
    "matrix tf32": (512, 1024, "multiply-adds/cycle", PAPER),
    "matrix 8": (2048, 4096, "multiply-adds/cycle", PAPER),
    "warp product": (1.0, 0.62, "of that rate, for mma.sync", MICRO),
    "issue": (4, 4, "instructions/cycle", PAPER),
    "fma": (64, 128, "lanes/cycle", GUIDE),
    "imad": (64, 64, "lanes/cycle", GUIDE),
    "alu": (64, 64, "lanes/cycle", GUIDE),
    "special": (16, 16, "lanes/cycle", f"{GUIDE}; conversions that are not packed taken alike"),
    "shuffle": (32, 32, "lanes/cycle", GUIDE),
    "shared": (128, 128, "bytes/cycle", "32 banks of 4 bytes; global loads and copies pass the same memory"),
    "L2": (
        47,
        38,
        "bytes/cycle",
        "5120 bytes/cycle of the whole cache, as A100's whitepaper has it; assumed of H100 too",
    ),
    "registers": (65536, 65536, "", LIMITS),
    "shared memory": (164 << 10, 228 << 10, "bytes", LIMITS),
    "reserved": (1 << 10, 1 << 10, "bytes of it per block", LIMITS),
    "warps": (64, 64, "", LIMITS),
    "blocks": (32, 32, "", LIMITS),
    "wait alu": (4, 4, "cycles", MICRO),
    "wait special": (18, 18, "cycles", MICRO),
    "wait matrix": (25, 33, "cycles", MICRO),
    "wait shared": (29, 29, "cycles", MICRO),
    "wait shuffle": (23, 23, "cycles", MICRO),
    "wait L2": (262, 263, "cycles", MICRO),
    "wait memory": (466, 479, "cycles", MICRO),
    "wait barrier": (20, 20, "cycles", "assumed"),
    "passes": (
        8,
        8,
        "",
        "assumed of a loop inside the hot one whose constants do not tell: 128 columns in steps of 16",
    ),
}
ARCHES = ("80", "90")


def assumed(arch: str) -> dict[str, float]:
    """Name -> value, of ``ASSUMED``."""
    return {name: values[ARCHES.index(arch)] for name, values in ASSUMED.items()}
