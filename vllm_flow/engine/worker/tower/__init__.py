"""What the vision tower says of a picture's tokens."""
