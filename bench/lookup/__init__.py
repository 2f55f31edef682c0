"""Benchmarks of the lookup memory: each row of its promises against its peers, in one run.

    python -m bench lookup [--only ROW ...] [--quick] [--folder FOLDER] [--threads N] [--out FILE]

Each module here is a group of rows (:mod:`bench.contests`). The ceilings of random rows, in memory and on a disk, are
probes of the host module: ``random_rows`` and ``direct_reads``. What cannot run here says why.
"""
