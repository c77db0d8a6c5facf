"""Benchmarks: how fast and how exact; `python -m experiments.benchmarks` lists them."""
