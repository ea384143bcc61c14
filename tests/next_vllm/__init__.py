"""A vLLM that has no CPU build yet: its Python over the installed CPU build's binaries."""
