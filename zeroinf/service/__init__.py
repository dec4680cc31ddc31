"""A loaded model that takes requests as they come: what a run, a Python session, an evaluation and a server share.

Here live the model's loading and closing, its KV cache, the guard of its GPU memory, and the requests that run through
it. Files, formats and journals live above, in `zeroinf.jobs`; forwards, sampling and caches below.
"""
