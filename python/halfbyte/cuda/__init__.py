"""The ops on NVIDIA GPUs: libhalfbyte_cuda behind the public functions, chosen by the device of a tensor.

Nothing here is imported before a tensor on a GPU comes, or the `doctor` asks.
"""
