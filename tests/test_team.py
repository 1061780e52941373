"""Several processes that share one training come to what one would."""

import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.checkpoints import Checkpoints
from rlhf.curves import CurveRecorder, no_log
from rlhf.errors import UserError
from rlhf.models import load_causal, load_tokenizer, save_model
from rlhf.params import AdapterParams, DynamicSampling
from rlhf.params_file import load_params
from rlhf.policies import PolicyFiles, Run, train_policy
from rlhf.policies.ppo import train_ppo
from rlhf.policies.sampling import SharedLuck
from rlhf.team import Team, join_team
from tests.tiny import paid_by_chance, run_in_two_processes

ROOT = Path(__file__).parent.parent
ADAPTER = AdapterParams(rank=2, alpha=4, dropout=0.0, target_modules="all-linear", quantise=None)
CASES: dict[str, dict[str, Any]] = {
    "critic": {"missing_eos_penalty": 0.5, "score_scaling": "whiten", "gradient_accumulation_steps": 2},
    "running": {"score_scaling": "running", "target_kl": 1e-4, "update_epochs": 3},
    "adapter": {"adapter": ADAPTER, "critic": "adapter", "kl_in": "loss", "kl_estimator": "full"},
    # Half of the pairs of answers are paid alike, so that refills are odd in number, down to a single one.
    "groups": {"advantage": "leave_one_out", "group_size": 2, "dynamic_sampling": DynamicSampling(max_refills=2)},
}


class Looks:
    """A watch that ends a training after its third look, and goes back to what it saw at the second."""

    key, inputs = "", []

    def __init__(self) -> None:
        self.seen = 0
        self.weights: dict[str, Any] = {}

    def look(self, model: Any, step: int, total: int | None) -> bool:
        self.seen += 1
        if self.seen == 2:
            self.weights = {name: value.clone() for name, value in model.state_dict().items()}
        return self.seen == 3

    def roll_back(self, model: Any, step: int) -> None:
        model.load_state_dict(self.weights)

    def state(self) -> Any:
        return self.seen, self.weights

    def restore(self, state: Any) -> None:
        self.seen, self.weights = state


def make_section(case: str, root: Path) -> Any:
    section = load_params(ROOT / "params.yaml").policies["ppo"]
    sizes = {"steps": 4, "batch_size": 12, "minibatches": 3, "max_new_tokens": 12, "temperature": 0.8}
    paid = {"rewards": paid_by_chance(root)} if case == "groups" else {}
    return section.model_copy(update=sizes | {"learning_rate": 1e-3} | paid | CASES.get(case, {}))


def train_all(folder: Path, files: PolicyFiles) -> None:
    """Every case's policy with its curves, then one that is watched, and one that is stopped and goes on."""
    rank = os.environ.get("RANK", "0")

    def train(name: str, case: str, log: Any = no_log, **others: Any) -> None:
        curves = CurveRecorder(log)
        model = train_policy(make_section(case, files.root), files, 7, curves, **others)
        save_model(model, load_tokenizer(files.sft), folder / name)
        (folder / f"{name}-{rank}.json").write_text(json.dumps(curves.rows))

    def stop(_: Any, step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    for case in CASES:
        train(case, case)
    train("watched", "critic", watch=Looks())
    checkpoints = Checkpoints(folder / f"checkpoints-{rank}", 0, math.inf)
    with pytest.raises(KeyboardInterrupt):
        train("resumed", "critic", stop, checkpoints=checkpoints)
    assert (folder / f"checkpoints-{rank}").exists() == (rank == "0"), "one process writes them"
    train("resumed", "critic", checkpoints=checkpoints)


def test_two_processes_give_the_policies_of_one(policy_files: PolicyFiles, tmp_path: Path) -> None:
    """Equal figures at every step on both processes, and equal weights, but for rounding."""
    files = replace(policy_files, root=tmp_path)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    train_all(tmp_path / "one", files)
    run_in_two_processes(__file__, str(tmp_path / "two"), *map(str, vars(files).values()))
    start = load_causal(files.sft).state_dict()
    for case in (*CASES, "watched", "resumed"):
        one = json.loads((tmp_path / "one" / f"{case}-0.json").read_text())
        for rank in (0, 1):
            two = json.loads((tmp_path / "two" / f"{case}-{rank}.json").read_text())
            assert two.keys() == one.keys()
            for step, figures in one.items():
                assert two[step] == pytest.approx(figures, abs=2e-4, rel=2e-3), (case, step)
        models = [load_causal(tmp_path / name / case).state_dict() for name in ("one", "two")]
        assert any((models[0][name] - start[name]).abs().max() > 1e-3 for name in start), "it learnt something"
        for name, weight in models[0].items():
            torch.testing.assert_close(models[1][name], weight, atol=2e-4, rtol=1e-3)
    refills = json.loads((tmp_path / "two" / "groups-1.json").read_text())
    assert sum(figures["groups/refills"] for figures in refills.values()) > 2
    assert len(json.loads((tmp_path / "two" / "watched-1.json").read_text())) == 2, "both stop at the third look"
    resumed, straight = (tmp_path / "two" / name / "model.safetensors" for name in ("resumed", "critic"))
    assert resumed.read_bytes() == straight.read_bytes()


def test_random_numbers_go_on_as_where_the_longest_answer_was_drawn() -> None:
    class WithOthers(Team):
        def gather(self, value: Any) -> list[Any]:
            return [value, 3]

    scores = torch.zeros(2, 5)
    states = []
    for draws in (1, 3):
        torch.manual_seed(0)
        luck = SharedLuck(WithOthers(0, 2), range(2), 4, 1.0)
        for _ in range(draws):
            luck(scores, scores)
        luck.draw_what_others_drew()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_shared_luck_draws_what_multinomial_draws() -> None:
    scores = torch.randn(6, 50, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    expected = torch.multinomial((scores / 0.7).softmax(-1), 1).flatten()
    for rows in (range(4), range(4, 6)):
        torch.manual_seed(0)
        drawn = SharedLuck(Team(0, 2), rows, 6, 0.7)(scores, scores[rows.start : rows.stop]).argmax(-1)
        assert torch.equal(drawn, expected[rows.start : rows.stop])


@pytest.mark.parametrize(("count", "unit"), [(12, 1), (12, 4), (2, 2), (7, 1)])
def test_shares_are_whole_and_complete(count: int, unit: int) -> None:
    shares = [Team(rank, 3).share(count, unit) for rank in range(3)]
    assert [row for share in shares for row in share] == list(range(count))
    assert all(len(share) % unit == 0 for share in shares)


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_a_launcher_that_splits_the_weights_is_refused(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(variable, "true")
    with pytest.raises(UserError, match="each process has to hold the whole model"):
        join_team()


def test_processes_that_cannot_share_a_minibatch_are_refused(
    policy_files: PolicyFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    run = Run(0, no_log, team=Team(0, 3))
    with pytest.raises(UserError, match="batch_size / minibatches is 4, which 3 processes cannot share evenly"):
        train_ppo(make_section("critic", policy_files.root), policy_files, run)


if __name__ == "__main__":
    to, *places = map(Path, sys.argv[1:])
    train_all(to, PolicyFiles(*places))
