"""GGUF files: what their header says, the transformers config that follows from it, and a folder for both.

`header` reads metadata and the table of tensors, of all parts of a split file; `configs` makes a config of them, or
refuses what it does not know; `folder` keeps config and tokenizer in the user's cache, while weights stay in the file;
`convert` writes weights in full, for engines that need them so. How weights are held packed is `quantized.gguf`'s.
"""
