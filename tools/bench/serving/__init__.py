"""The parts of `kvtier bench serve`."""
