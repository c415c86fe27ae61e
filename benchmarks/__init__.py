"""Measurements: speed, memory and quality, each with a dense baseline; results in ``results/``."""
