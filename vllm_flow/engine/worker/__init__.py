"""The workers' processes: steps of the model in which rows leave."""
