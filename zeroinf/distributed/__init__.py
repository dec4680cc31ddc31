"""Ranks: who we are among them, the control channel between them, noticing when one dies, and saying who waits for whom.

Tensors of the model never pass through here; engines talk to each other in their own way.
"""
