"""Private and version-bound interfaces of torch, transformers and other libraries, each behind a small function.

Every docstring here says what is relied on and since when, and each function has a test of its own. Nothing here knows
of models, plans or engines.
"""
