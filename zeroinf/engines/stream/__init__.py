"""Our weight streaming: blocks rest in host memory, one copy a node, or on NVMe, and cross the link one by one.

`tensors` and `layout` say where each tensor of a block lies, `host` holds bytes. `weights` loads them, from a
checkpoint (`load`) or from a store (`stored`), which `store` describes, `disk` reads and `write` writes under a `lock`,
and which `keep` looks after for the user. `ahead` reads blocks before their turn, `carrier` moves them over one link or
over all, `ring` does so ahead of use and `stalls` measures what it waits for. `engine` runs the unmodified transformers
model.
"""
