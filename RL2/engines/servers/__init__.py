"""Engines made of inference servers: SGLang and vLLM."""
