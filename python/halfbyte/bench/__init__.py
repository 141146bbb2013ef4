"""Measuring: interleaved rounds of halfbyte, other tools and the machine's ceilings in one process."""
