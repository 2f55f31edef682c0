"""Benchmarks of memkernels.store: each row of its promises against its peers, in one run.

    python -m bench store [--only ROW ...] [--quick] [--large] [--folder FOLDER] [--out FILE]

A group of rows is a module here with ``ROWS``: name -> a function that yields findings (:mod:`bench.store.finding`). A
:class:`~bench.store.contest.Contest` first checks every variant, then times the right ones in turns, and judges medians
of ratios. A variant whose result is wrong has no speed. Peers are extras: the row of one that is absent says why.
"""
