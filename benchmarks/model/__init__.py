"""Whole models: compile time, the seeded demo, time to the first token."""
