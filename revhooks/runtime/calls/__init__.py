"""What a call depends on, so that it can be repeated."""
