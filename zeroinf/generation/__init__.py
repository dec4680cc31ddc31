"""From token ids to token ids: micro-batches, KV caches, the decode loop, sampling, stop conditions.

It drives any engine through the protocol in `zeroinf.engines.base` and knows nothing of files, ranks or where weights
live.
"""
