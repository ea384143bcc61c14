"""A step's way through the decoder's layers, eager or compiled."""
