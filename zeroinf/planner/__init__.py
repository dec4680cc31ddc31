"""Chooses a run's settings and predicts its memory and time: pure functions and frozen dataclasses, no I/O, no torch.

Input: an anatomy, a machine and the user's constraints. Output: a plan that accounts for every byte.
"""
