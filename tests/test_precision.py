"""Policy training in bf16 with an adapter, as large models are trained, on a machine without a GPU."""

from pathlib import Path

import pytest
import torch

from rlhf.curves import CurveRecorder, no_log
from rlhf.errors import UserError
from rlhf.models import load_causal, load_tokenizer, save_model
from rlhf.params import AdapterParams
from rlhf.params_file import load_params
from rlhf.policies import train_policy

ROOT = Path(__file__).parent.parent
PARAMS = load_params(ROOT / "params.yaml")
ADAPTER = AdapterParams(rank=4, alpha=8, dropout=0.0, target_modules="all-linear", quantise=None)
SIZES = {"steps": 2, "epochs": 0.5, "batch_size": 8, "group_size": 4, "max_new_tokens": 6, "max_length": 256}


def small(section):
    changes = {name: value for name, value in SIZES.items() if hasattr(section, name)}
    if section.algorithm == "grpo":
        changes["rewards"] = PARAMS.policies["ppo"].rewards  # by rule alone, bad answers would all be equally bad
    return section.model_copy(update=changes | {"precision": "bf16", "adapter": ADAPTER, "learning_rate": 0.01})


def check(model, start, folder):
    """It moved, it is finite, and it reads back."""
    save_model(model, load_tokenizer(start), folder)
    before, after = load_causal(start), load_causal(folder)
    changed = [
        name
        for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True)
        if not torch.allclose(old, new, atol=1e-4, rtol=1e-2)
    ]
    assert all(parameter.isfinite().all() for parameter in after.parameters())
    assert any("_proj" in name for name in changed)


@pytest.mark.parametrize("name", PARAMS.policies)
def test_a_policy_trains(policy_files, tmp_path, name):
    curves = CurveRecorder(no_log)
    check(train_policy(small(PARAMS.policies[name]), policy_files, 0, curves), policy_files.sft, tmp_path / name)
    assert curves.rows


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device may quantise")
@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_a_machine_that_cannot_quantise_says_so(policy_files, name):
    section = small(PARAMS.policies[name]).model_copy(
        update={"adapter": ADAPTER.model_copy(update={"quantise": "nf4"})}
    )
    with pytest.raises(UserError, match="set adapter.quantise to null"):
        train_policy(section, policy_files, 0, no_log)
