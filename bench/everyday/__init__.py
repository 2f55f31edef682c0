"""``python -m bench --everyday``: is a call ever slower than what it replaces? Calls as people make them, every op.

    python -m bench --everyday [--only WORD ...] [--quick] [--threads N] [--out FILE] [--losses OLD [--below RATIO]]

:mod:`~bench.everyday.grid` lists the cases, :mod:`~bench.everyday.plain` what they are held against. Every variant is
checked against the float64 reference before it is timed (:mod:`~bench.everyday.measure`); one that is wrong has no
speed. The ratio of a case is the time of its fastest peer over ours: above 1 the op wins.
"""
