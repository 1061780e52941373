"""The families of policies over TRL: each learns, reaches TRL as written, and refuses what cannot be meant."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError
from ruamel.yaml import YAML

from rlhf.curves import CurveRecorder, no_log
from rlhf.data.formats import training_rows, write_rows
from rlhf.errors import UserError
from rlhf.models import trainer_settings
from rlhf.params import AdapterParams, GroupParams, IterativeDPOParams, PairParams, PolicyParams, TrainingParams
from rlhf.params_file import load_params
from rlhf.policies import groups, iterative_dpo, train_policy
from rlhf.policies.kto import labelled_answers
from rlhf.scoring import Reward
from tests.learning import change, check_trained, sample_to_the_limit
from tests.tiny import ANSWER, share_of_letters

ROOT = Path(__file__).parent.parent
PARAMS = load_params(ROOT / "params.yaml")
DPO, GRPO = (PARAMS.policies[name].model_dump() for name in ("dpo", "grpo"))
SMALL = {"batch_size": 8, "learning_rate": 0.01, "warmup_share": 0.0}
PAIRS = {name: DPO[name] for name in PairParams.model_fields} | SMALL
PAIRS |= {"contradicted": "keep", "epochs": 1.0, "max_length": 256}
GROUPS = {name: GRPO[name] for name in GroupParams.model_fields} | SMALL
GROUPS |= {"steps": 2, "group_size": 4, "max_new_tokens": 6, "rewards": {"answer": ANSWER}}
BASES = {
    "dpo": DPO | PAIRS | {"algorithm": "dpo", "sft_weight": 0.0},
    "kto": PAIRS
    | {"algorithm": "kto", "loss": "kto", "desirable_weight": 1.0, "undesirable_weight": 1.0, "epochs": 0.5},
    "orpo": PAIRS | {"algorithm": "orpo"},
    "cpo": PAIRS | {"algorithm": "cpo", "loss": "sigmoid", "gamma": None, "sft_weight": 0.0, "label_smoothing": 0.0},
    "grpo": GRPO | GROUPS | {"algorithm": "grpo"},
    "rloo": GROUPS | {"algorithm": "rloo", "whiten_advantages": False},
    "iterative_dpo": {name: (DPO | GROUPS)[name] for name in IterativeDPOParams.model_fields if name in DPO | GROUPS}
    | {"algorithm": "iterative_dpo", "sft_weight": 0.0, "epochs": 1.0, "rounds": 2, "reference": "sft"}
    | {"prompts_per_round": 8},
}
SIMPO = {"loss": "simpo", "gamma": 0.5, "beta": 2.0}
SMOOTHED = ("robust", "exo_pair", "aot")
DPO_LOSSES = ("hinge", "ipo", "sigmoid_norm", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop")
VARIANTS = [
    *[("dpo", {"loss": loss}) for loss in DPO_LOSSES],
    *[("dpo", {"loss": loss, "label_smoothing": 0.1}) for loss in SMOOTHED],
    ("dpo", {"ld_alpha": 0.5}),
    ("kto", {}),
    ("kto", {"loss": "apo_zero_unpaired"}),
    ("orpo", {}),
    ("cpo", {}),
    ("cpo", {"loss": "hinge"}),
    ("cpo", {"loss": "ipo"}),
    ("cpo", SIMPO),
    *[("grpo", {"loss": loss}) for loss in ("dr_grpo", "dapo", "bnpo")],
    ("grpo", {"loss": "cispo", "clip_range_high": 5.0}),
    ("grpo", {"importance_sampling_level": "sequence", "beta": 0.0, "scale_rewards": "none"}),
    ("grpo", {"scale_rewards": "batch", "clip_range_high": 0.28, "update_epochs": 2}),
    ("rloo", {}),
    ("rloo", {"whiten_advantages": True, "beta": 0.0}),
    ("iterative_dpo", {}),
    ("iterative_dpo", {"reference": "previous"}),
]


def section(algorithm, **changes):
    return TypeAdapter(PolicyParams).validate_python(BASES[algorithm] | changes)


@pytest.fixture(scope="module")
def files(policy_files, tmp_path_factory):
    """Pairs for two steps of eight."""
    path = tmp_path_factory.mktemp("few") / "preferences.jsonl"
    write_rows(path, training_rows(policy_files.preferences)[:16])
    return replace(policy_files, preferences=path)


@pytest.fixture(autouse=True)
def _letters_are_rewarded(monkeypatch):
    """By rule alone, the bad answers of a model this small would all be equally bad, and hardly one ever ends."""
    monkeypatch.setattr(iterative_dpo, "sample", sample_to_the_limit)
    for module in (groups, iterative_dpo):
        monkeypatch.setattr(module, "build_rewards", lambda *_: [Reward("mine", share_of_letters, 1.0)])


@pytest.mark.parametrize(("algorithm", "changes"), VARIANTS, ids=str)
def test_two_steps_move_the_policy(files, tmp_path, algorithm, changes):
    curves = CurveRecorder(no_log)
    model = train_policy(section(algorithm, **changes), files, 0, curves)
    check_trained(model, files.sft, tmp_path)
    assert max(curves.rows) == 2
    assert all(math.isfinite(value) for row in curves.rows.values() for value in row.values())


@pytest.mark.parametrize("algorithm", ["kto", "orpo", "cpo", "rloo", "iterative_dpo"])
def test_an_adapter_in_bf16_trains(files, tmp_path, algorithm):
    adapter = AdapterParams(rank=4, alpha=8, dropout=0.0, target_modules="all-linear", quantise=None)
    params = section(algorithm).model_copy(update={"adapter": adapter, "precision": "bf16"})
    check_trained(train_policy(params, files, 0, no_log), files.sft, tmp_path)


@pytest.mark.parametrize(("algorithm", "changes"), [("kto", {}), ("orpo", {"beta": 20.0}), ("cpo", {}), ("cpo", SIMPO)])
def test_the_margin_grows(files, algorithm, changes):
    params = section(algorithm, **changes | {"epochs": 4.0})
    assert change(params, files, "chosen") > change(params, files, "rejected") + 0.5


def test_rloo_learns_what_is_rewarded(files):
    curves = CurveRecorder(no_log)
    params = section("rloo", steps=25, batch_size=32, learning_rate=0.02, beta=0.0)
    train_policy(params, files, 0, curves)
    rewards = [row["rewards/mine/mean"] for _, row in sorted(curves.rows.items())]
    assert rewards[-1] > rewards[0] + 0.2


def test_a_pair_gives_a_good_row_and_a_bad_one(files):
    pairs = training_rows(files.preferences)
    rows = labelled_answers(pairs, 0)
    expected = [(pair["prompt"], pair[side], side == "chosen") for pair in pairs for side in ("chosen", "rejected")]
    assert Counter((row["prompt"], row["completion"], row["label"]) for row in rows) == Counter(expected)
    neighbours = sum(first["prompt"] == second["prompt"] for first, second in zip(rows, rows[1:], strict=False))
    assert neighbours < len(pairs) / 4
    assert rows != labelled_answers(pairs, 1)


# what reaches TRL ---------------------------------------------------------------------------------


def configured(algorithm, tmp_path, **changes):
    """The configuration that TRL's trainer gets, without a training."""
    from importlib import import_module

    params = section(algorithm, **changes)
    settings = trainer_settings(params, 0, tmp_path)
    if isinstance(params, GroupParams):
        settings |= groups.group_settings(params)
    return import_module(f"rlhf.policies.{algorithm}").configuration(params, settings)


@pytest.mark.parametrize(
    ("algorithm", "changes", "expected"),
    [
        ("dpo", {}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.0], "beta": 0.2, "ld_alpha": None}),
        ("dpo", {"loss": "robust", "label_smoothing": 0.2}, {"loss_type": ["robust", "sft"], "label_smoothing": 0.2}),
        ("dpo", {"ld_alpha": 0.3}, {"ld_alpha": 0.3, "precompute_ref_log_probs": True}),
        (
            "kto",
            {"desirable_weight": 1.3, "undesirable_weight": 0.7},
            {"loss_type": "kto", "desirable_weight": 1.3, "undesirable_weight": 0.7, "max_length": None},
        ),
        ("orpo", {"beta": 0.4}, {"beta": 0.4, "max_length": 258}),
        ("cpo", {"sft_weight": 1.0}, {"loss_type": "sigmoid", "cpo_alpha": 1.0, "simpo_gamma": 0.0, "alpha": 0.0}),
        ("cpo", SIMPO, {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.5, "beta": 2.0}),
        (
            "grpo",
            {},
            {
                "loss_type": "grpo",
                "importance_sampling_level": "token",
                "scale_rewards": "group",
                "epsilon_high": None,
                "mask_truncated_completions": False,
                "beta": 0.02,
            },
        ),
        (
            "grpo",
            {"clip_range_high": 0.28, "mask_truncated": True},
            {"epsilon": 0.2, "epsilon_high": 0.28, "mask_truncated_completions": True},
        ),
        ("rloo", {"whiten_advantages": True}, {"normalize_advantages": True, "num_generations": 4, "beta": 0.02}),
    ],
)
def test_params_reach_trl(tmp_path, algorithm, changes, expected):
    built = configured(algorithm, tmp_path, **changes)
    assert {name: getattr(built, name) for name in expected} == expected
    assert not built.gradient_checkpointing


# refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "changes", "sentence"),
    [
        ("dpo", {"label_smoothing": 0.1}, "loss 'sigmoid' takes no notice of it; set label_smoothing to 0, or loss to"),
        ("dpo", {"loss": "exo_pair"}, "label_smoothing is 0, whose logarithm it takes"),
        ("dpo", {"ld_alpha": 1.5}, "less than or equal to 1"),
        ("kto", {"batch_size": 1}, "batch_size is 1 but loss 'kto' estimates its KL from the other answers"),
        ("kto", {"desirable_weight": 0.0}, "greater than 0"),
        ("orpo", {"beta": 0.0}, "greater than 0"),
        ("cpo", SIMPO | {"gamma": None}, "gamma is null; give the margin"),
        ("cpo", {"gamma": 0.5}, "loss 'sigmoid' has no margin; set gamma to null"),
        ("cpo", {"loss": "ipo", "label_smoothing": 0.1}, "loss 'ipo' takes no notice of it"),
        ("grpo", {"loss": "cispo"}, "clip_range_high is null but loss 'cispo' caps the ratio itself"),
        ("grpo", {"loss": "cispo", "clip_range_high": 0.2}, "clip_range_high is 0.2 but loss 'cispo' caps"),
        ("grpo", {"loss": "dapo", "importance_sampling_level": "sequence"}, "set loss to grpo"),
        ("grpo", {"dynamic_sampling": {"max_refills": 0}}, "greater than or equal to 1"),
        (
            "grpo",
            {"dynamic_sampling": {"max_refills": 1}, "scale_rewards": "batch"},
            "set scale_rewards to group or none",
        ),
        ("iterative_dpo", {"group_size": 1}, "greater than or equal to 2"),
        ("iterative_dpo", {"rounds": 0}, "greater than or equal to 1"),
        ("iterative_dpo", {"beta": 0.0}, "greater than 0"),
        ("iterative_dpo", {"label_smoothing": 0.1}, "loss 'sigmoid' takes no notice of it"),
        ("iterative_dpo", {"rewards": {}}, "no reward is named"),
        ("rloo", {"group_size": 1}, "greater than or equal to 2"),
        ("rloo", {"group_size": 3}, "= 8 is not divisible by group_size 3"),
    ],
)
def test_what_cannot_be_meant_is_refused(algorithm, changes, sentence):
    with pytest.raises(ValidationError, match=sentence):
        section(algorithm, **changes)


@pytest.mark.parametrize("algorithm", ["kto", "orpo", "cpo"])
def test_pairs_are_checked_before_training(files, tmp_path, algorithm):
    with pytest.raises(UserError, match=r"tokens long, max_length is 12"):
        train_policy(section(algorithm, max_length=12), files, 0, no_log)
    write_rows(tmp_path / "none.jsonl", [])
    with pytest.raises(UserError, match=f"{algorithm} has no preference pairs"):
        train_policy(section(algorithm), replace(files, preferences=tmp_path / "none.jsonl"), 0, no_log)


@pytest.mark.parametrize("algorithm", BASES)
def test_the_readme_leads_to_a_page(algorithm):
    page = f"docs/methods/{algorithm}.md"
    assert page in (ROOT / "README.md").read_text(encoding="utf-8")
    assert (ROOT / page).exists()


@pytest.mark.parametrize("algorithm", ["kto", "orpo", "cpo", "rloo", "iterative_dpo"])
def test_the_section_in_a_page_is_complete(algorithm):
    page = (ROOT / "docs" / "methods" / f"{algorithm}.md").read_text(encoding="utf-8")
    block = page.split("```yaml\n")[1].split("```")[0]
    (values,) = YAML(typ="safe", pure=True).load(block)["policies"].values()
    training = {name: DPO[name] for name in TrainingParams.model_fields}
    assert TypeAdapter(PolicyParams).validate_python(training | values).algorithm == algorithm
