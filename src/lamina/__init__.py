"""Lamina serves language models with attention and KV cache on other devices than the rest."""

__version__ = "0.1.0"
