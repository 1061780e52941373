"""The yardstick: the same prompts, the same seeds and the same code for every policy."""
