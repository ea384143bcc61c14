"""Which rows of an image stay, where only the device can tell."""
