"""pagerd: one memory for many processes."""
