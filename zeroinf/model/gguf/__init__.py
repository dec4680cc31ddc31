"""GGUF files: their header, the transformers config derived from it, and a folder with config and tokenizer.

`header` reads metadata and the table of tensors of all parts of a split file; `families` lists the architectures that
are known to run, and the `parts` of which `configs` makes a config of a file's `facts`, or refuses what it does not
know; `folder` keeps config and tokenizer in the user's cache, while weights stay in the file;
`convert` writes the weights in full, for engines that need them so. Packed weights in modules are the task of
`quantized.gguf`.
"""
