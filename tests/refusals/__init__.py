"""The table of tests/test_refusals.py: a world, and by subject what may be wrong with it."""
