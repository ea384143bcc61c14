"""Looks inside a model: LLaVA-CAM, attention mass per span, and the figures of both."""
