"""Health rules: every rule on hand-made curves, curves' names as they are really logged, and the way to people."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
from prefect.states import Completed, Failed

from flows import results
from rlhf.curves import CurveRecorder, no_log
from rlhf.health import BROKEN, RELATIVES, RULES, Rule, end, judge_curves, noise, start, write_health
from rlhf.params import Params, PolicyParams
from rlhf.policies import PolicyFiles
from tasks import policy, sft
from tasks.paths import Paths
from tasks.stage import Workspace
from tasks.tracking import lineage
from tests.tiny import ANSWER, ROOT, tiny_params

NAN, INF = math.nan, math.inf
Curves = list[list[float]]


def ramp(first: float, last: float, points: int = 40) -> list[float]:
    """From one value to another, with a little noise, so that no rule meets a straight line alone."""
    return [first + (last - first) * index / (points - 1) + 0.001 * (-1) ** index for index in range(points)]


def flat(value: float, points: int = 40) -> list[float]:
    return [value] * points


# Curves in the order in which a rule names them: sound ones, and those beyond each of its thresholds.
CASES: dict[str, dict[str, Curves]] = {
    "figures that are no numbers": {"ok": [[0.5, -3]], "warn": [[0.5, NAN]], "stop": [[0.5, INF, NAN]]},
    "no gradient": {"ok": [flat(0.5)], "warn": [ramp(1, 0) + flat(2e-6)], "stop": [flat(0)]},
    "gradient blow-up": {"ok": [ramp(1, 4)], "warn": [ramp(1, 12)], "stop": [flat(0.1) + flat(20)]},
    "entropy collapse": {"ok": [ramp(1, 0.4)], "warn": [ramp(1, 0.1)], "stop": [ramp(1, -0.01)]},
    "KL blow-up": {"ok": [flat(0.2), flat(1)], "warn": [ramp(0, 0.5), flat(1)], "stop": [ramp(0, 2), flat(1)]},
    "negative KL": {"ok": [flat(0), flat(1)], "warn": [flat(-0.05), flat(1)], "stop": [flat(-0.3), flat(1)]},
    "steps too large": {"ok": [flat(0.01)], "warn": [flat(0.1)], "stop": [flat(2)]},
    "clipping too often": {"ok": [flat(0.1)], "warn": [flat(0.3)], "stop": [flat(0.6)]},
    "groups all equal": {"ok": [ramp(0.1, 0.4)], "warn": [ramp(0.1, 0.8)], "stop": [flat(1)]},
    "most groups dropped": {"ok": [ramp(0.1, 0.6)], "warn": [ramp(0.1, 0.9)]},
    "reward falls": {"ok": [ramp(0.5, 0.7)], "warn": [ramp(0.5, 0.4)], "stop": [ramp(0.5, 0.1)]},
    "over-optimisation": {"ok": [flat(0)], "warn": [[0.0, 0.0, 1.0]]},
    "answers cut off": {"ok": [flat(0.05)], "warn": [ramp(0, 0.3)], "stop": [ramp(0, 0.9)]},
    "answers do not end": {"ok": [flat(0.95)], "warn": [flat(0.8)], "stop": [flat(0.3)]},
    "stop rate falls": {"ok": [flat(0.4)], "warn": [ramp(1, 0.85)], "stop": [ramp(1, 0.5)]},
    "answers grow": {"ok": [ramp(20, 25)], "warn": [ramp(20, 40)]},
    "answers shrink": {"ok": [ramp(20, 15)], "warn": [ramp(20, 5)], "stop": [ramp(20, 1)]},
    "critic learns nothing": {"ok": [ramp(-2, 0.3)], "warn": [flat(-0.2)], "stop": [ramp(0, -2)]},
    "chosen answers become less likely": {
        "ok": [ramp(-20, -21)],
        "warn": [ramp(-20, -30)],
        "stop": [ramp(-20, -60)],
    },
    "preferences learnt by heart": {"ok": [ramp(0.5, 0.9)], "warn": [ramp(0.5, 1)]},
    "margin too large": {"ok": [ramp(0, 2)], "warn": [ramp(0, 8)], "stop": [ramp(0, 40)]},
    "held-out loss rises": {"ok": [ramp(0.7, 0.3)], "warn": [ramp(0.7, 0.3) + [0.4]], "stop": [ramp(0.7, 0.3) + [0.9]]},
    "reward model guesses": {"ok": [ramp(0.5, 0.7)], "warn": [flat(0.52)], "stop": [flat(0.45)]},
}
BY_NAME = {rule.name: rule for rule in RULES}
TRIALS = [
    pytest.param(rule, algorithm, verdict, curves, id=f"{rule.name}-{algorithm}-{verdict}")
    for rule in RULES
    for algorithm in rule.curves
    for verdict, curves in CASES[rule.name].items()
]


def make_rows(names: tuple[str, ...], curves: Curves) -> dict[int, dict[str, float]]:
    rows: dict[int, dict[str, float]] = {}
    for name, curve in zip(names, curves, strict=False):
        for step, value in enumerate(curve, 1):
            rows.setdefault(step, {})["loss" if name == BROKEN else name] = value
    return rows


@pytest.mark.parametrize(("rule", "algorithm", "verdict", "curves"), TRIALS)
def test_a_rule_speaks_beyond_its_thresholds_and_not_before(
    rule: Rule, algorithm: str, verdict: str, curves: Curves
) -> None:
    health = judge_curves(algorithm, make_rows(rule.curves[algorithm], curves))
    (found,) = [found for found in health["findings"] if found["rule"] == rule.name]
    assert found["verdict"] == verdict, found["finding"]
    assert ("meaning" in found and "remedy" in found) == (verdict != "ok")


def test_every_rule_has_curves_for_each_of_its_verdicts() -> None:
    assert len(BY_NAME) == len(RULES)
    wanted = {rule.name: {"ok", "warn", *(["stop"] if rule.stop is not None else [])} for rule in RULES}
    assert {name: set(cases) for name, cases in CASES.items()} == wanted


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_waits_for_enough_points(rule: Rule) -> None:
    algorithm = next(iter(rule.curves))
    short = [curve[: rule.points - 1] for curve in CASES[rule.name]["warn"]]
    health = judge_curves(algorithm, make_rows(rule.curves[algorithm], short))
    assert rule.name in health["silent"]


def test_start_end_and_noise_by_hand() -> None:
    curve = [float(value) for value in range(20)]
    assert (start(curve), end(curve), noise(curve)) == (0.5, 18.5, 0)
    assert (start([3.0]), end([3.0]), noise([3.0, 5.0])) == (3, 3, 0)
    assert noise([0.0, 1.0, 0.0]) == pytest.approx(math.sqrt(4 / 6)), "the bend is −2"


def test_kl_counts_per_token() -> None:
    """Eight nats on an answer of 64 tokens are no blow-up, on one of 16 they are."""
    names = BY_NAME["KL blow-up"].curves["ppo"]
    verdicts = [judge_curves("ppo", make_rows(names, [flat(8), flat(length)]))["verdict"] for length in (64, 16)]
    assert verdicts == ["ok", "warn"]


def test_noise_about_a_reward_of_zero_is_no_fall() -> None:
    wobble = [0.05 * (-1) ** index - 0.0001 * index for index in range(60)]
    rounding = [-1e-8 * index for index in range(60)]
    for curve in (wobble, rounding):
        assert judge_curves("ppo", make_rows(("objective/scores",), [curve]))["verdict"] == "ok"


def test_a_loss_of_zero_is_normal_for_grpo() -> None:
    rows = {step: {"loss": 0.0, "grad_norm": 0.4} for step in (1, 2)}
    assert judge_curves("grpo", rows)["verdict"] == "ok"
    assert "A loss of 0 alone is normal in GRPO's first step" in BY_NAME["no gradient"].meaning


def test_the_worst_verdict_counts_and_stands_first(tmp_path: Path) -> None:
    rows = make_rows(("rewards/accuracies", "rewards/margins", "grad_norm"), [flat(1), flat(40), flat(1)])
    assert write_health(tmp_path, "dpo", rows) == 2
    first = (tmp_path / "health.json").read_bytes()
    health = json.loads(first)
    assert health["verdict"] == "stop"
    assert [found["verdict"] for found in health["findings"]][:3] == ["stop", "warn", "ok"]
    assert health["silent"] == ["over-optimisation", "chosen answers become less likely"]
    write_health(tmp_path, "dpo", dict(reversed(rows.items())))
    assert (tmp_path / "health.json").read_bytes() == first
    assert judge_curves("reward", {}) | {"silent": []} == {
        "algorithm": "reward", "verdict": "ok", "findings": [], "silent": []
    }  # fmt: skip


# the stages ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, policy_files: PolicyFiles, tiny_world: Any) -> Paths:
    """Models and rows as the stages sft and policy find them."""
    from rlhf.data.formats import write_rows

    paths = Paths(tmp_path_factory.mktemp("health"))
    for name, folder in {"base": policy_files.sft, "sft": policy_files.sft, "reward": policy_files.reward}.items():
        shutil.copytree(folder, paths.model(name))
    for kind, source in {"prompts": policy_files.prompts, "preferences": policy_files.preferences}.items():
        paths.rows(kind, "train").parent.mkdir(parents=True)
        shutil.copy(source, paths.rows(kind, "train"))
    write_rows(paths.rows("prompts", "test"), tiny_world.prompts[1])
    for split, rows in zip(("train", "test"), (tiny_world.sft[0][:16], tiny_world.sft[0][:4]), strict=True):
        write_rows(paths.rows("sft", split), rows)
    return paths


@pytest.fixture(scope="module")
def params() -> Params:
    """Every reward in the mix, groups for PPO too and refills for GRPO, so that every curve there is is logged."""
    raw = tiny_params()
    mix = {"reward_model": {"kind": "reward_model", "weight": 0.2}, "answer": ANSWER}
    raw["policies"]["ppo"] |= {"rewards": mix, "group_size": 2}
    raw["policies"]["grpo"] |= {"rewards": mix, "dynamic_sampling": {"max_refills": 1}}
    raw["policies"]["dpo"] |= {"max_length": 200}
    return Params.model_validate(raw)


@pytest.mark.parametrize("algorithm", ["ppo", "grpo", "dpo", "sft"])
def test_a_training_logs_what_its_rules_read_and_leaves_its_health(
    algorithm: str, params: Params, workspace: Paths
) -> None:
    curves = CurveRecorder(no_log)
    if algorithm == "sft":
        shutil.copytree(workspace.root, workspace.root.with_name("sft"), dirs_exist_ok=True)
        stage, item, paths = "sft", None, Paths(workspace.root.with_name("sft"))
        sft.run(params, paths, curves)
    else:
        stage, item, paths = "policy", algorithm, workspace
        policy.run(params, paths, curves, algorithm)
    logged = {name for row in curves.rows.values() for name in row} | {BROKEN}
    named = {name for rule in RULES for name in rule.curves.get(algorithm, ())}
    if algorithm == "ppo":  # with a critic there are no refills
        named -= {"groups/dropped"}
    assert named <= logged
    health = json.loads((paths.report(stage, item) / "health.json").read_text(encoding="utf-8"))
    assert {found["rule"] for found in health["findings"]} >= {"figures that are no numbers", "no gradient"}
    metrics = json.loads(paths.metrics(stage, item).read_text(encoding="utf-8"))
    assert metrics["health"] == ["ok", "warn", "stop"].index(health["verdict"])


# to people ----------------------------------------------------------------------------------------


@pytest.fixture
def sick(tmp_path: Path) -> Paths:
    """A workspace with a policy that learnt its preferences by heart, and a sound SFT model."""
    paths = Paths(tmp_path)
    write_health(paths.report("policy", "dpo"), "dpo", make_rows(("rewards/margins",), [flat(40)]))
    write_health(paths.report("policy", "old"), "dpo", make_rows(("rewards/margins",), [flat(40)]))
    write_health(paths.report("sft"), "sft", make_rows(("grad_norm",), [flat(1)]))
    return paths


def test_tags_name_the_verdict_and_the_rules_behind_it(sick: Paths) -> None:
    tags = lineage.health_tags(sick.report("policy", "dpo"))
    assert tags["alignflow.health"] == "stop"
    assert tags["alignflow.health.margin too large"].startswith("stop; β × margin")
    assert lineage.health_tags(sick.report("sft")) == {"alignflow.health": "ok"}
    assert lineage.health_tags(sick.report("validate")) == {}
    assert all(re.fullmatch(r"[A-Za-z0-9_ ./-]+", rule.name) for rule in RULES), "what MLflow takes as part of a tag"


def test_the_flow_s_page_tells_of_complete_trainings(sick: Paths) -> None:
    workspace = Workspace(sick)
    states = {"sft": Completed(), "policy@dpo": Completed(), "policy@old": Failed(message="broke")}
    page = results._page(workspace, states, [], 1.0)
    assert "## Health" in page
    assert "| policy@dpo | stop | margin too large | β × margin" in page
    assert BY_NAME["margin too large"].remedy in page
    assert "policy@old | stop" not in page
    assert "## Health" not in results._page(workspace, {"sft": Completed()}, [], 1.0)


# the page -----------------------------------------------------------------------------------------


def describe(rule: Rule) -> str:
    """A row of the table in docs/health.md."""
    curves = ", ".join(
        f"{algorithm}: {' and '.join(name if name == BROKEN else f'`{name}`' for name in names)}"
        for algorithm, names in rule.curves.items()
    )
    stop = "–" if rule.stop is None else f"{rule.side} {rule.stop:g}"
    cells = [f"**{rule.name}**", curves, rule.figure, f"{rule.side} {rule.warn:g}", stop, rule.meaning, rule.remedy]
    return f"| {' | '.join(cells)} |"


def test_the_page_holds_every_rule_as_it_is() -> None:
    lines = (ROOT / "docs" / "health.md").read_text(encoding="utf-8").splitlines()
    table = [line for line in lines if line.startswith("| **")]
    wanted = [describe(rule) for rule in RULES]
    assert table == wanted, "docs/health.md differs from rlhf/health.py; its table should be:\n" + "\n".join(wanted)


@pytest.mark.parametrize(("algorithm", "relative"), RELATIVES.items())
def test_relatives_are_judged_alike(algorithm: str, relative: str) -> None:
    rows = {step: {"grad_norm": 1e-9, "reward": 1.0 - step} for step in range(6)}
    judged = judge_curves(algorithm, rows)
    assert judged["verdict"] == "stop"
    assert judged == judge_curves(relative, rows) | {"algorithm": algorithm}


def test_every_algorithm_has_rules() -> None:
    algorithms = {kind.model_fields["algorithm"].annotation for kind in get_args(get_args(PolicyParams)[0])}
    known = {name for rule in RULES for name in rule.curves} | set(RELATIVES)
    assert {name for kind in algorithms for name in get_args(kind)} <= known
