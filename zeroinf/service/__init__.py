"""A loaded model that accepts requests at any time: the common base of runs, Python sessions, evaluations and servers.

This package holds loading and closing of a model, its KV cache, the guard of its GPU memory, and the requests that run
through it. Files, formats and journals belong to `zeroinf.jobs`; forwards, sampling and caches to the packages below.
"""
