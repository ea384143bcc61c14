"""Tests of what all commands promise."""
