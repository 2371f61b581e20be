"""Planted wrong rewrites: what a certificate must catch. `python -m mutants` (in tests/) runs all and prints the table."""
