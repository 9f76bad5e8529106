"""Texts that reports are compared with."""
