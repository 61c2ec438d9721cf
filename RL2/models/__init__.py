"""Models: loading, number formats, LoRA, and token statistics of a causal LM."""
