"""Generation: micro-batches, KV caches, the generation loop, sampling and stop conditions.

Input: rows of token ids. Output: rows with generated token ids. It drives any engine through the protocol in
`zeroinf.engines.base` and knows nothing of files, ranks or where weights are kept.
"""
