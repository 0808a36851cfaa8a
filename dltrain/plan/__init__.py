"""A training on a machine that is not there: its memory, its time, and what will go wrong."""
