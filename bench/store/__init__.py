"""Benchmarks of memkernels.store: each row of its promises against its peers, in one run.

    python -m bench store [--only ROW ...] [--quick] [--large] [--folder FOLDER] [--out FILE]

Each module here is a group of rows (:mod:`bench.contests`). Peers are extras: the row of one that is absent says why.
"""
