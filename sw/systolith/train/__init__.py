"""Trainings that run from the command line, and their reports."""
