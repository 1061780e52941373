"""Data that a model makes: instructions with answers, and preferences between its own answers."""
