"""Benchmarks of the engine's parts, each a module to run."""
