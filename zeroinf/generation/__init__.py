"""From token ids to token ids: micro-batches, the decode loop, sampling, stop conditions.

It drives any engine through the protocol in  and knows nothing of files, ranks or where weights live.
"""
