"""Frames: one forward call of one block, and how it is rebuilt."""
