"""Benchmarks: ``python -m benchmarks.<what>``; raw results are JSON files in ``benchmarks/results``."""
