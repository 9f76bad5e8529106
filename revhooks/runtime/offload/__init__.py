"""Offload: what waits in host memory, and when it moves."""
