"""What a model is, without loading it: where it comes from, its config, its tensors and its tokenizer."""
