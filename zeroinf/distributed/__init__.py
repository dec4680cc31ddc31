"""Ranks: who we are among them, the control channel between them, noticing a death, and saying who waits for whom.

Tensors of the model never pass through here; engines talk to each other in their own way.
"""
