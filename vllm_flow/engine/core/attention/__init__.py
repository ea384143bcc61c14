"""The attention log: from the workers' numbers to files, once a token is part of an answer."""
