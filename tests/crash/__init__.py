"""The crash laboratory of memkernels.store: kills, power cuts, damage, refusals of the system, and readers beside a
writer, each judged by the same law: the store is what a model of its history says, or it says what is wrong.

    PYTHONPATH=tests python -m crash --help
"""
