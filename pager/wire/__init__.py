"""What daemon and clients say to each other: frames, messages and their versions."""
