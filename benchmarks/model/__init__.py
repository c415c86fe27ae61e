"""Whole models: compile time, the layout of prompts, time to the first token."""
