"""Preference-alignment methods: data, supervised fine-tuning, reward models, policies, evaluation."""

import os

# TRL reports every trainer it builds over the network; read when huggingface_hub is imported, hence here.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
