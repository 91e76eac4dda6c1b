"""`besa bench`: what serving the sparse model gains, and what it costs.

from besa.bench.settings import BenchConfig, Contender
from besa.bench.run import bench

config = BenchConfig((Contender("dense", "DENSE"), Contender("sparse", "SPARSE")))
results = bench(config)
"""
