"""Ranks: the process's rank and world size, the control channel between ranks, detection of dead ranks and of
deadlocks.

Tensors of the model never pass through here; engines communicate in their own way.
"""
