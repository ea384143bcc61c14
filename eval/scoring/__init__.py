"""Answers that somebody else's engine gave: joined with their questions, and scored."""
