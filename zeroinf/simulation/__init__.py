"""A run on paper: real models and the real decode loop on the meta device, which has shapes but no memory.

What is recorded here (allocations in their order, arithmetic, traffic) feeds the planner's memory and time models.
"""
