"""The scheduler's process: what a request stores in which blocks, and what is found again."""
