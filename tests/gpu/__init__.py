"""Needs a CUDA device."""
