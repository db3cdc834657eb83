"""Attention as functions of tensors: specification, operators, kernels; keys and values in few bits.

Nothing here knows of stores, policies or models.
"""
