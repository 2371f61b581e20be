"""Random programs built as graphs, without a capture, so that many fit into a run. `python -m fuzz N` (in tests/) runs N."""
