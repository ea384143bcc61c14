"""The front end's process: which policy a request has, whether it fits, and what is counted."""
