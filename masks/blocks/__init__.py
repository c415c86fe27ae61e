"""Which blocks of keys a block of queries keeps: scores, budgets, block lists."""
