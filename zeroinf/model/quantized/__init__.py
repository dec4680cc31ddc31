"""Checkpoints that are quantized already: modules hold what the checkpoint holds, and expand it as they run.

`registry` finds the format, each of which has a file; `expansion` is what they share. Reading weights is the engines'
work.
"""
