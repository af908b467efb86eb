"""Synthesis flows."""
