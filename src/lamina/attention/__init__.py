"""The attention operator: specs, reference, backends, merging and partitions."""
