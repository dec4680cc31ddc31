"""DeepSpeed ZeRO stage 3: the config that follows from a model's shapes, and the engine that runs it."""
