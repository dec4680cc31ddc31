"""Our weight streaming: blocks rest in host memory, one copy a node, and cross the link one after the other.

`layout` says where each tensor of a block lies, `host` holds the bytes, `load` fills them, `carrier` moves them over
one link or over all, `ring` does so ahead of use, `engine` runs the unmodified transformers model over it.
"""
