"""Converter: any transformers decoder that uses the attention interface -> a `SlicedModel`."""
