"""What a model is, without loading it: where it comes from, its config, its tensors, its cache and its tokenizer.

`source` finds it and `weights` its files; `inspect` and `kv` count it on the meta device into an `Anatomy`;
`catalog` knows the shapes of well-known models; `gguf` reads GGUF files, `quantized` lets modules hold packed weights,
`parts` says what a parameter is made of in the checkpoint; `demo` finds the model that comes with zeroinf.
Reading weights into memory is the engines' work.
"""
