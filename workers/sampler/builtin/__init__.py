"""The built-in sampler: a small server on transformers that speaks the part of vLLM's protocol that Hone uses.

Started as `python -m workers.sampler.builtin`; nothing imports it. Does not cover: GPUs (use vLLM there).
"""
