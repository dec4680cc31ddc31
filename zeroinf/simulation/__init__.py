"""Simulates a run: real models and the real generation loop on the meta device, which has shapes but no memory.

Output: allocations in their order, arithmetic and memory traffic, from which the planner computes memory and time.
"""
