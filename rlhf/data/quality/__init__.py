"""The quality of rows that are sound one by one: what they repeat, give away, contradict and reward by their looks."""
