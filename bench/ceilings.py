"""The ceilings: the best multiply-add rate that this machine has shown in the run, the read bandwidth around a case."""

from __future__ import annotations

import torch

from memkernels import _native

from .timers import interleave


class Ceilings:
    """Peaks are measured at the start of the run and again on the way; the best counts: they are only underestimated.

    What the memory gives changes several-fold with what other machines on the same hardware do, for seconds or
    minutes. So the bandwidth of a case is the better of what was measured right before and right after it.

    On the CPU: fused multiply-adds in registers, and a SIMD sum over an array of several times the last-level cache.
    On a GPU: the rate of a large matrix product, and the bandwidth of a copy.
    """

    def __init__(self, device: str, threads: int, quick: bool, isa: str = "") -> None:
        self.device, self.threads, self.isa = device, threads, isa
        self.seconds = 0.1 if quick else 0.3
        self.peaks: dict[str, float] = {}
        self.bandwidth = self._last = 0.0

    def refresh(self) -> None:
        """Measure the peaks and the bandwidth of now."""
        peaks = self._cpu_peaks() if self.device == "cpu" else self._cuda_peaks()
        # float32 multiply-adds serve bfloat16 too, after widening; on some processors they are the faster way.
        if "bfloat16" in peaks:
            peaks["bfloat16"] = max(peaks["bfloat16"], peaks["float32"])
        for dtype, value in peaks.items():
            self.peaks[dtype] = max(value, self.peaks.get(dtype, 0.0))
        self.look()

    def look(self) -> None:
        """Measure the bandwidth of now; ``bandwidth`` is the better of this time and the last."""
        now = self._cpu_bandwidth() if self.device == "cpu" else self._cuda_bandwidth()
        self.bandwidth, self._last = max(now, self._last), now

    @property
    def fast_bfloat16(self) -> bool:
        """Whether bfloat16 dot products are faster than float32 multiply-adds."""
        return self.peaks.get("bfloat16", 0.0) > 1.2 * self.peaks["float32"]

    def _cpu_peaks(self) -> dict[str, float]:
        measure = _native.host().multiply_add_peak
        return {
            dtype: measure(dtype, self.threads, self.seconds, self.isa) for dtype in ("float32", "float64", "bfloat16")
        }

    def _cpu_bandwidth(self) -> float:
        return _native.host().read_bandwidth(0, self.threads, self.seconds)

    def _cuda_peaks(self) -> dict[str, float]:
        n, peaks = 8192, {}
        for dtype in (torch.float32, torch.bfloat16):
            a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
            spread = interleave({"product": [lambda a=a, b=b: a @ b]}, "cuda", self.seconds)["product"]
            peaks[str(dtype).removeprefix("torch.")] = 2 * n**3 / spread.low
        return peaks

    def _cuda_bandwidth(self) -> float:
        source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        spread = interleave({"copy": [lambda: target.copy_(source)]}, "cuda", self.seconds)["copy"]
        return 2 * source.nbytes / spread.low
