"""Attention, in one folder: operands and tiles, walks over them, and what is found there."""
