"""`besa bench`: what serving the sparse model gains, and what it costs.

    besa bench SPARSE --against DENSE

In Python: `besa.bench.run.bench`.
"""
