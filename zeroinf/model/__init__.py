"""Describes models without loading them: source, config, tensors, KV cache and tokenizer.

`source` finds a model and `weights` its files; `inspect` and `kv` count it on the meta device into an `Anatomy`;
`catalog` knows the shapes of well-known models; `gguf` reads GGUF files, `quantized` lets modules hold packed weights,
`stored_parts` says of which stored tensors a parameter consists; `demo` finds the model that comes with zeroinf.
Reading weights into memory is the engines' task.
"""
