"""Measures what `Rates` holds, here and now: one idea a file, seconds a figure. Nothing of it runs beside other work.

`machine.measure_machine` does all that applies. What a process takes of a GPU is seen in fresh processes.
"""
