"""Figures, timing on a GPU, and what runs every benchmark there."""
