"""A reward model with hidden layers between the last token's state and the score, as transformers loads it.

A copy of this file lies beside the weights of every model saved from it, so that the model also loads where alignflow
is not installed (`trust_remote_code=True`); therefore it imports nothing of ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class MLPScorerConfig(PreTrainedConfig):
    """The transformer's own configuration under `backbone`, and the sizes of the `hidden` layers."""

    model_type = "mlp_scorer"

    def __init__(self, backbone: dict[str, Any] | None = None, hidden: Sequence[int] = (), **settings: Any) -> None:
        self.backbone = backbone or {"model_type": "llama"}
        self.hidden = list(hidden)
        self.max_position_embeddings = self.backbone.get("max_position_embeddings")
        super().__init__(**{"num_labels": 1, "pad_token_id": self.backbone.get("pad_token_id"), **settings})


class MLPScorerForSequenceClassification(PreTrainedModel):
    """A transformer and a perceptron (LeakyReLU) that reads the state of the last token that is no padding."""

    config_class = MLPScorerConfig
    base_model_prefix = "backbone"

    def __init__(self, config: MLPScorerConfig) -> None:
        super().__init__(config)
        backbone: Any = AutoConfig.for_model(**config.backbone)
        self.backbone = AutoModel.from_config(backbone)
        self.score = build_head([backbone.get_text_config().hidden_size, *config.hidden])
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **_: Any,
    ) -> SequenceClassifierOutput:
        """Logits (batch, 1) of `input_ids` (batch, tokens), padded on either side."""
        states = self.backbone(input_ids, attention_mask=attention_mask, position_ids=position_ids).last_hidden_state
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = (positions * (input_ids != self.config.pad_token_id)).argmax(-1)
        logits: Any = self.score(states[torch.arange(len(states), device=states.device), last])
        return SequenceClassifierOutput(logits=logits)


def build_head(sizes: Sequence[int]) -> nn.Sequential:
    """Layers from the size of an embedding over the hidden ones to one score."""
    layers: list[nn.Module] = []
    for width, following in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(width, following), nn.LeakyReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], 1))


# What `save_pretrained` needs to write this file beside the weights, and the Auto classes to know it again.
MLPScorerConfig.register_for_auto_class()
MLPScorerForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
AutoConfig.register(MLPScorerConfig.model_type, MLPScorerConfig, exist_ok=True)
AutoModelForSequenceClassification.register(MLPScorerConfig, MLPScorerForSequenceClassification, exist_ok=True)
