"""A grid of runs: planned, made once each, and reported."""
