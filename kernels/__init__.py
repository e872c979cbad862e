"""Triton kernels of LAD, the same mathematics in in-place PyTorch, and the autograd functions on both.

- ``ops``: the registered operators and their autograd functions; the rest of the library calls only these.
- ``chain``, ``hidden_loss``, ``logit_loss``: the Triton back end.
- ``eager``: the "torch" back end.
- ``launch``: everything that depends on the device.
"""
