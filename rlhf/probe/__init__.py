"""The hackability probe: whether cheap tricks beat content in a reward model's eyes, before a policy finds out."""
