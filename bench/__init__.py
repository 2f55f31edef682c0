"""Benchmarks of memkernels against other ways to compute the same thing.

    python -m bench [op ...] [--quick] [--threads N] [--device cpu] [--out FILE] [--compare FILE]
    python -m bench --everyday [--only WORD ...] [--quick] [--losses FILE]
    python -m bench store [--only ROW ...] [--quick] [--large]
    python -m bench lookup [--only ROW ...] [--quick]
    python -m bench.report FILE

A case (:mod:`bench.cases`) declares its inputs, its work and its goals once. A peer (:mod:`bench.peers`) is one file.
The harness (:mod:`bench.harness`) first checks every variant against the float64 reference, then times the right ones
interleaved, beside the two ceilings measured in the same run (:mod:`bench.ceilings`). A variant whose numbers are wrong
has no speed.
"""
