"""Program to Program: one file per pass."""
