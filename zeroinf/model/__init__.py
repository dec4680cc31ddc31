"""What a model is, without loading it: where it comes from, its config, its tensors, its cache and its tokenizer.

`source` finds it and `weights` its files; `inspect` and `kv` count it on the meta device into an `Anatomy`;
`catalog` knows the shapes of well-known models; `demo`, `gguf` and `cache` make a checkpoint folder of a packed file.
Reading weights into memory is the engines' work.
"""
