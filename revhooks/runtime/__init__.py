"""What happens inside ``with reversible():``. Start with `run.Run`, then `frame.Frame`."""
