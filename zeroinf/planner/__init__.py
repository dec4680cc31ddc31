"""Chooses a run's settings and predicts its memory and time: pure functions and frozen dataclasses, no I/O, no torch.

The request says what the user asked for, the plan says what happens, byte by byte.
"""
