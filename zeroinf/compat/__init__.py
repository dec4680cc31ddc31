"""Private and version-bound interfaces of torch and transformers, each behind one function with a test of its own.

Every docstring here says what is relied on and since when. Nothing here knows of models, plans or engines.
"""
