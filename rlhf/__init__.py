"""Preference-alignment methods: data, supervised fine-tuning, reward models, policies, evaluation."""
