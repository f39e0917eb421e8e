"""Tensors of which each rank stores a piece: row shards, flat fragments, and the way to whole ones and back."""
