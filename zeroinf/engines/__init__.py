"""What can run a model: a small protocol, and one folder for each engine.

An engine loads weights where the plan says and runs forwards. It does not sample, does not batch, and does not read
requests.
"""
