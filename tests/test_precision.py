"""Policy training in bf16 with an adapter, as large models are trained, on a machine without a GPU."""

from pathlib import Path

import pytest
import torch

from rlhf.curves import CurveRecorder, no_log
from rlhf.errors import UserError
from rlhf.params import AdapterParams
from rlhf.params_file import load_params
from rlhf.policies import train_policy
from tests.learning import check_trained

ROOT = Path(__file__).parent.parent
PARAMS = load_params(ROOT / "params.yaml")
ADAPTER = AdapterParams(rank=4, alpha=8, dropout=0.0, target_modules="all-linear", quantise=None)
SIZES = {"steps": 2, "epochs": 0.5, "batch_size": 8, "group_size": 4, "max_new_tokens": 6, "max_length": 256}


def small(section):
    changes = {name: value for name, value in SIZES.items() if hasattr(section, name)}
    if section.algorithm == "grpo":
        changes["rewards"] = PARAMS.policies["ppo"].rewards  # by rule alone, bad answers would all be equally bad
    return section.model_copy(update=changes | {"precision": "bf16", "adapter": ADAPTER, "learning_rate": 0.01})


@pytest.mark.parametrize("name", PARAMS.policies)
def test_a_policy_trains(policy_files, tmp_path, name):
    curves = CurveRecorder(no_log)
    model = train_policy(small(PARAMS.policies[name]), policy_files, 0, curves)
    check_trained(model, policy_files.sft, tmp_path / name)
    assert curves.rows


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device may quantise")
@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_a_machine_that_cannot_quantise_says_so(policy_files, name):
    section = small(PARAMS.policies[name]).model_copy(
        update={"adapter": ADAPTER.model_copy(update={"quantise": "nf4"})}
    )
    with pytest.raises(UserError, match="set adapter.quantise to null"):
        train_policy(section, policy_files, 0, no_log)
