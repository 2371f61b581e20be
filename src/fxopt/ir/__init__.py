"""The graph as a value."""
