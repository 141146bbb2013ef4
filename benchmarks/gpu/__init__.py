"""The parts of gpu_suite.py: what it builds, checks, times and compares on a GPU."""
