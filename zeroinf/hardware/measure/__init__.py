"""Measures this machine's rates (`Rates`): one module for each kind of rate, seconds for each figure.

`all_rates.measure_machine` runs all that apply. Memory that a process takes of a GPU is measured in fresh processes.
Nothing else should run on the machine at the same time.
"""
