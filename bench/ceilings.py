"""The ceilings of the run: the best multiply-add rate and read bandwidth that this machine has shown in it."""

from __future__ import annotations

import torch

from memkernels import _native

from .timers import interleave


class Ceilings:
    """Measured at the start of the run and again on the way; the best counts, as a ceiling can only be underestimated.

    On the CPU: fused multiply-adds in registers, and a SIMD sum over an array of several times the last-level cache.
    On a GPU: the rate of a large matrix product, and the bandwidth of a copy.
    """

    def __init__(self, device: str, threads: int, quick: bool, isa: str = "") -> None:
        self.device, self.threads, self.isa = device, threads, isa
        self.seconds = 0.1 if quick else 0.3
        self.peaks: dict[str, float] = {}
        self.bandwidth = 0.0

    def refresh(self) -> None:
        measure = self._cpu if self.device == "cpu" else self._cuda
        peaks, bandwidth = measure()
        # float32 multiply-adds serve bfloat16 too, after widening; on some processors they are the faster way.
        if "bfloat16" in peaks:
            peaks["bfloat16"] = max(peaks["bfloat16"], peaks["float32"])
        for dtype, value in peaks.items():
            self.peaks[dtype] = max(value, self.peaks.get(dtype, 0.0))
        self.bandwidth = max(self.bandwidth, bandwidth)

    @property
    def fast_bfloat16(self) -> bool:
        """Whether bfloat16 dot products are faster than float32 multiply-adds."""
        return self.peaks.get("bfloat16", 0.0) > 1.2 * self.peaks["float32"]

    def _cpu(self) -> tuple[dict[str, float], float]:
        host = _native.host()
        peaks = {
            dtype: host.multiply_add_peak(dtype, self.threads, self.seconds, self.isa)
            for dtype in ("float32", "float64", "bfloat16")
        }
        return peaks, host.read_bandwidth(0, self.threads, 2 * self.seconds)

    def _cuda(self) -> tuple[dict[str, float], float]:
        n, peaks = 8192, {}
        for dtype in (torch.float32, torch.bfloat16):
            a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
            spread = interleave({"product": [lambda a=a, b=b: a @ b]}, "cuda", self.seconds)["product"]
            peaks[str(dtype).removeprefix("torch.")] = 2 * n**3 / spread.low
        source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        spread = interleave({"copy": [lambda: target.copy_(source)]}, "cuda", self.seconds)["copy"]
        return peaks, 2 * source.nbytes / spread.low
