"""Intervals, resampling and what they allow to say."""
