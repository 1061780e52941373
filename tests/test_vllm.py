"""Answers from vLLM, which needs a GPU: here a stand-in with its interface answers, and TRL's code talks to it."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rlhf.curves import CurveRecorder, no_log
from rlhf.errors import UserError
from rlhf.models import load_causal, load_tokenizer, save_model
from rlhf.params import AdapterParams, VLLMParams
from rlhf.params_file import load_params
from rlhf.policies import PolicyFiles, train_policy
from tests.tiny import paid_by_chance, run_python

ROOT = Path(__file__).parent.parent
SETTINGS = {
    "mode": "colocate",
    "server_base_url": None,
    "gpu_memory_utilization": 0.25,
    "tensor_parallel_size": 1,
    "max_model_length": 96,
    "enable_sleep_mode": False,
}
ADAPTER = AdapterParams(rank=2, alpha=4, dropout=0.0, target_modules="all-linear", quantise=None)
POLICIES: dict[str, tuple[str, dict[str, Any]]] = {
    "ppo": ("ppo", {"minibatches": 2}),
    "ppo-adapter": ("ppo", {"minibatches": 2, "adapter": ADAPTER, "critic": "adapter"}),
    "grpo": ("grpo", {"group_size": 4, "dynamic_sampling": None}),
}
STAND_IN = '''
"""The part of vLLM's interface that TRL calls, over a model of transformers; every call is written to CALLS."""
import json, os
from types import SimpleNamespace as Some
import torch
from transformers import AutoModelForCausalLM

def note(**what):
    with open(os.environ["CALLS"], "a") as file:
        file.write(json.dumps(what) + "\\n")

class RequestOutput: ...

class SamplingParams:
    def __init__(self, **settings):
        self.settings = settings

class LLM:
    def __init__(self, model, **settings):
        self.model = AutoModelForCausalLM.from_pretrained(model).eval()
        note(llm=settings, model=model)
        runner = Some(model=Some(load_weights=self.load_weights))
        executor = Some(driver_worker=Some(model_runner=runner))
        config = Some(max_model_len=settings["max_model_len"])
        self.llm_engine = Some(model_executor=executor, model_config=config)

    def load_weights(self, weights):
        own = dict(self.model.named_parameters())
        for name, value in weights:
            own[name].data.copy_(value)

    def reset_prefix_cache(self):
        pass

    @torch.no_grad()
    def generate(self, prompts, sampling_params, use_tqdm):
        weights = float(sum(value.double().abs().sum() for value in self.model.parameters()))
        note(prompts=len(prompts), weights=weights, settings=sampling_params.settings)
        return [self.answer(prompt["prompt_token_ids"], sampling_params.settings) for prompt in prompts]

    def answer(self, ids, settings):
        tokens, logprobs = list(ids), []
        while len(tokens) - len(ids) < settings["max_tokens"]:
            scores = self.model(torch.tensor([tokens])).logits[0, -1] / settings["temperature"]
            token = int(torch.multinomial(scores.softmax(-1), 1))
            logprobs.append({token: Some(rank=1, logprob=float(scores.log_softmax(-1)[token]))})
            tokens.append(token)
            if token == self.model.config.eos_token_id:
                break
        return Some(prompt_token_ids=ids, outputs=[Some(token_ids=tokens[len(ids):], logprobs=logprobs)])
'''


def make_section(name: str, root: Path) -> Any:
    algorithm, changes = POLICIES[name]
    sizes = {"steps": 3, "batch_size": 8, "max_new_tokens": 6, "learning_rate": 1e-3, "temperature": 0.8}
    section = load_params(ROOT / "params.yaml").policies[algorithm]
    return section.model_copy(
        update=sizes | changes | {"rewards": paid_by_chance(root), "vllm": VLLMParams(**SETTINGS)}
    )


def train_all(folder: Path, files: PolicyFiles) -> None:
    for name in POLICIES:
        os.environ["CALLS"] = str(folder / f"{name}.calls")
        curves = CurveRecorder(no_log)
        save_model(
            train_policy(make_section(name, files.root), files, 0, curves), load_tokenizer(files.sft), folder / name
        )
        (folder / f"{name}.json").write_text(json.dumps(curves.rows))


@pytest.fixture(scope="module")
def trained(policy_files: PolicyFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the policies left behind, trained where the stand-in is installed as vllm 0.30.0."""
    folder = tmp_path_factory.mktemp("vllm")
    packages = {
        "vllm/__init__.py": STAND_IN,
        "vllm/sampling_params.py": "class StructuredOutputsParams: ...\n",
        "vllm/utils/__init__.py": "",
        "vllm/utils/network_utils.py": "def get_ip(): ...\n",
        "vllm/distributed/__init__.py": "",
        "vllm/distributed/weight_transfer/__init__.py": "",
        "vllm/distributed/weight_transfer/nccl_common.py": "def trainer_init(): ...\n",
        "vllm/distributed/weight_transfer/packed_tensor.py": "def packed_nccl_broadcast_producer(): ...\n",
        "vllm/distributed/weight_transfer/nccl_engine.py": (
            "class NCCLTrainerSendWeightsArgs: ...\nclass NCCLWeightTransferEngine: ...\n"
        ),
        "vllm-0.30.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: vllm\nVersion: 0.30.0\n",
        "vllm-0.30.0.dist-info/top_level.txt": "vllm\n",
    }
    for name, text in packages.items():
        (folder / "packages" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "packages" / name).write_text(text)
    run_python([__file__, str(folder), *map(str, vars(policy_files).values())], [folder / "packages"])
    return folder


@pytest.mark.parametrize("name", POLICIES)
def test_vllm_answers_with_the_weights_of_the_moment(trained: Path, policy_files: PolicyFiles, name: str) -> None:
    """Once a step, for the whole batch, by the settings of the params, from the SFT model first."""
    calls = [json.loads(line) for line in (trained / f"{name}.calls").read_text().splitlines()]
    [made] = [call for call in calls if "llm" in call]
    assert made["model"] == str(policy_files.sft)
    assert (made["llm"]["gpu_memory_utilization"], made["llm"]["max_model_len"]) == (0.25, 96)
    asked = [call for call in calls if "prompts" in call]
    assert [call["prompts"] for call in asked] == [8, 8, 8]
    assert all(call["settings"]["max_tokens"] == 6 and call["settings"]["temperature"] == 0.8 for call in asked)
    assert all(call["settings"]["top_p"] == 1.0 and call["settings"]["top_k"] == 0 for call in asked)
    start = float(sum(value.detach().double().abs().sum() for value in load_causal(policy_files.sft).parameters()))
    assert asked[0]["weights"] == pytest.approx(start, rel=1e-6)
    assert len({round(call["weights"], 4) for call in asked}) == 3, "new weights after every step"


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_learns_from_what_vllm_answered(trained: Path, policy_files: PolicyFiles, name: str) -> None:
    curves = json.loads((trained / f"{name}.json").read_text())
    assert all(0 < row["completions/mean_length"] <= 6 for row in curves.values() if "completions/mean_length" in row)
    before, after = (load_causal(folder).state_dict() for folder in (policy_files.sft, trained / name))
    assert any((before[key] - after[key]).abs().max() > 1e-3 for key in before)
    if name == "ppo":
        assert curves["1"]["policy/approxkl_avg"] < 0.05, "the answers are the policy's own"
    if name == "grpo":
        gap = [value for key, value in curves["3"].items() if "sampling/sampling_logp_difference/mean" in key]
        assert gap and gap[0] == pytest.approx(0.0, abs=1e-4), "vLLM's log-probabilities are the trainer's"


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_without_the_package_the_training_is_refused(policy_files: PolicyFiles, name: str) -> None:
    with pytest.raises(UserError, match=r"vllm is set but the package vllm is not installed.*set vllm to null"):
        train_policy(make_section(name, policy_files.root), policy_files, 0, no_log)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mode": "server"}, "mode is server but server_base_url is null"),
        ({"server_base_url": "http://localhost:8000"}, "mode is colocate but server_base_url is http://localhost"),
        ({"gpu_memory_utilization": 0.0}, "greater than 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        VLLMParams(**SETTINGS | changes)


if __name__ == "__main__":
    to, *places = map(Path, sys.argv[1:])
    train_all(to, PolicyFiles(*places))
