"""Data: the embedded world, outside sources, canonical formats, expectations."""
