"""Benchmarks: a matrix of runs, each in a process of its own, and what to make of their reports.

A cell is `zeroinf run --benchmark --report`; nothing is measured here that a run does not report itself.
"""
