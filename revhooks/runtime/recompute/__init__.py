"""Recomputation: how single tensors are made again."""
