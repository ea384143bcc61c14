"""Tests of what needs neither vLLM nor a model."""
