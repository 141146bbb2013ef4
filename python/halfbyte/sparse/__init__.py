"""Sparse weights: the patterns of zeros that kernels use, the format, the layers."""
