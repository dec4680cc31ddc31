"""Ranks: who we are among them, the control channel between them, and noticing when one dies.

Tensors of the model never pass through here; engines talk to each other in their own way.
"""
