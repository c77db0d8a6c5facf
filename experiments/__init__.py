"""Experiments: one script a question; `python -m experiments` lists them."""
