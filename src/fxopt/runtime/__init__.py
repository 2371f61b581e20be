"""Runs a Program, never rewrites one."""
