"""The demo model with four kinds of questions: what it knows, its scenes, its questions and its training."""
