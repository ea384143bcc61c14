"""How the grown model's weights are made; see ``run``."""
