"""Preference-alignment methods: data, supervised fine-tuning, reward models, policies, evaluation."""

import os

# TRL reports every trainer it builds over the network; read when huggingface_hub is imported, hence here.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# CPO and ORPO are in trl.experimental, which warns on import that it may change; the lock file pins TRL.
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
