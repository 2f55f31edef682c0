"""What ``python -m bench store`` and ``python -m bench lookup`` share: findings beside peers of the same run.

A group of rows is a module with ``ROWS``: name -> a function of a :class:`~bench.contests.setting.Setting` that yields
findings (:mod:`bench.contests.finding`). A :class:`~bench.contests.contest.Contest` first checks every variant, then
times the right ones in turns, and judges medians of ratios. A variant whose result is wrong has no speed.
"""
