"""KV pages: allocation (pure) and tensors."""
