"""Handles: what stands in the graph in place of saved tensors."""
