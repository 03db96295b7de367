"""The engine: plan, run, apply; its process, its client and the Python API."""
