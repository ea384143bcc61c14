"""The embedded demo model: a small LLaVA that anybody can assemble offline, with held-out material."""
