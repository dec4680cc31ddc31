"""Checkpoints that are already quantized: modules hold the quantized tensors, and expand them when they run.

`registry` finds the format; each format has a module; `expansion` is common to all. Reading weights is the engines'
task.
"""
