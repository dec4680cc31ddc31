"""Engines: everything that can run a model, behind one small protocol, with one folder for each engine.

An engine loads weights where the plan says and runs forwards. It does not sample, batch, or read requests.
"""
