"""What answer tokens attend to, read while the layers run."""
