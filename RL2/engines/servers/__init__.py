"""Engines that use inference servers: SGLang and vLLM."""
