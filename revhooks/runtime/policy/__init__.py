"""Policy: what is let go of, what stays, and what is checked."""
