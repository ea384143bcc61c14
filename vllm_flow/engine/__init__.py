"""What vLLM sees of vLLM-Flow. Thin: every decision is taken in ``policy``, ``spans`` and ``plan``."""
