"""Whole models: compile time, the demo, time to the first token."""
