"""Serving an artifact: an engine with continuous batching, its Triton model, and an OpenAI-compatible front."""
