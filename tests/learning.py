"""What a training did to a policy: whether it moved and can be saved, and whose log-probabilities it raised."""

from __future__ import annotations

import torch

from rlhf.curves import no_log
from rlhf.data.formats import training_rows
from rlhf.encoding import encode_answer
from rlhf.models import load_causal, load_tokenizer, save_model
from rlhf.policies import train_policy
from rlhf.policies.sampling import sample


def check_trained(model, start, folder):
    """It moved from the model in `start`, it is finite, and it reads back from `folder`."""
    save_model(model, load_tokenizer(start), folder)
    before, after = load_causal(start), load_causal(folder)
    changed = [
        name
        for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True)
        if not torch.allclose(old, new, atol=1e-4, rtol=1e-2)
    ]
    assert all(parameter.isfinite().all() for parameter in after.parameters())
    assert any("_proj" in name for name in changed)


def change(params, policy_files, side):
    """By how much training raises the mean log-probability of one side's answers."""
    rows, tokenizer = training_rows(policy_files.preferences), load_tokenizer(policy_files.sft)
    model = train_policy(params, policy_files, 0, no_log).eval()
    before = load_causal(policy_files.sft).eval()
    differences = [_log_prob(model, tokenizer, row, side) - _log_prob(before, tokenizer, row, side) for row in rows]
    return sum(differences) / len(differences)


def _log_prob(model, tokenizer, row, side):
    """Of the answer's tokens given the prompt, summed."""
    ids = torch.tensor([encode_answer(tokenizer, row["prompt"], row[side])])
    start = len(tokenizer(row["prompt"])["input_ids"])
    with torch.no_grad():
        log_probs = model(ids).logits[0, :-1].log_softmax(-1)
    return log_probs.gather(1, ids[0, 1:, None])[start - 1 :].sum().item()


def sample_to_the_limit(*arguments):
    """Sampled answers whose limit of tokens counts as an end."""
    batch, ended = sample(*arguments)
    return batch, torch.ones_like(ended)
