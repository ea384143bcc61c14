"""The attention log: how much an answer's tokens look at the image, taken while they are served."""
