"""Training that a pruned model recovers by: `besa recover`, and `KeepZeros` for users' own.

>>> from besa import KeepZeros
>>> KeepZeros().zeros
[]
"""
