"""Differential fuzzing."""
