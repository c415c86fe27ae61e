"""Speed at the rules whose quality was measured."""
