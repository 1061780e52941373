"""Score heads on frozen embeddings: what they learn from wrong labels, and the model that is saved."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch.nn.functional import binary_cross_entropy_with_logits

from rlhf.curves import no_log
from rlhf.examples import Examples
from rlhf.heads import Coordinates, fit_head, score_embedded
from rlhf.models import load_tokenizer
from rlhf.pairwise import Job, Verdict
from rlhf.params import RewardParams
from rlhf.ratings import with_constant
from rlhf.scoring import RewardModel, check_reward_model
from rlhf.trust import trust_labels
from tests.test_reward import make_section
from tests.tiny import make_transport

ROWS, DIMENSIONS = 400, 16


def make_ratings(seed: int, rows: int = ROWS) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings (rows, dimensions) with a large common mean, and labels that the first coordinate decides."""
    generator = np.random.default_rng(seed)
    points = generator.normal(size=(rows, DIMENSIONS)).astype(np.float32)
    return points * np.linspace(0.5, 2, DIMENSIONS, dtype=np.float32) + 3, np.where(points[:, 0] > 0.3, 1, -1)


def as_examples(labels: np.ndarray, first: int = 0) -> Examples:
    names = [f"row {number}" for number in range(len(labels))]
    return Examples(names, names, np.arange(first, first + len(labels))[:, None], [], labels, 0)


def fit(folder: Path, start: Path, section: RewardParams, train: Examples, known: tuple[Any, Verdict | None]) -> Any:
    embeddings, verdict = known
    job = Job(start, load_tokenizer(start), train, None, 0.2, folder, verdict)
    return fit_head(section, job, embeddings, 0, no_log)[0]


def test_flipped_ratings_are_found_and_the_selective_head_is_better_on_clean_ones(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    """A fifth of each label is wrong; a head with hidden layers memorises them unless they are left out."""
    embeddings, labels = make_ratings(0, 3 * ROWS)
    wrong = np.random.default_rng(1).random(ROWS) < 0.2
    train = as_examples(np.where(wrong, -labels[:ROWS], labels[:ROWS]))
    test = as_examples(labels[ROWS:], first=ROWS)
    features = with_constant(train.points(embeddings)) * train.labels[:, None]
    trust = trust_labels(features, np.arange(2 * ROWS).reshape(-1, 2), 0.2, 0)
    assert roc_auc_score(wrong, 1 - trust.right) > 0.85
    accuracy = {}
    for objective in ("bradley_terry", "selective"):
        changes = {
            "epochs": 30.0,
            "warmup_epochs": 2.0,
            "ramp_epochs": 2.0,
            "transport": make_transport(label_weight=0.1),
            "batch_size": 64,
        }
        section = make_section(objective=objective, frozen=True, hidden=[64], **changes)
        verdict = Verdict(trust.doubt, trust.right > 0.5)
        head = fit(tmp_path, tiny_model_dir, section, train, (embeddings, verdict))
        accuracy[objective] = (score_embedded(head, test, embeddings) > 0).mean()
    assert accuracy["selective"] > accuracy["bradley_terry"] + 0.03


def test_training_coordinates_fold_into_the_weights() -> None:
    embeddings = torch.from_numpy(make_ratings(0)[0])
    coordinates = Coordinates.of(embeddings)
    weight = torch.randn(3, DIMENSIONS + 1, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        coordinates(embeddings) @ weight.T, embeddings @ coordinates.fold(weight).T, atol=1e-3, rtol=1e-4
    )
    assert coordinates(embeddings)[:, :-1].square().mean(0).tolist() == pytest.approx([1.0] * DIMENSIONS, rel=1e-3)


def test_four_small_batches_equal_one_large(tmp_path: Path, tiny_model_dir: Path) -> None:
    embeddings, labels = make_ratings(0, 64)
    section = {"objective": "bradley_terry", "frozen": True, "hidden": [8], "epochs": 3.0}
    heads = [
        fit(tmp_path, tiny_model_dir, make_section(**section, **sizes), as_examples(labels), (embeddings, None))
        for sizes in ({"batch_size": 16}, {"batch_size": 4, "gradient_accumulation_steps": 4})
    ]
    for one, other in zip(*(head.parameters() for head in heads), strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("hidden", [[], [8, 4]])
@pytest.mark.parametrize("kind", ["pairs", "ratings"])
def test_a_saved_head_scores_texts_as_it_scores_their_embeddings(
    tmp_path: Path, tiny_model_dir: Path, tiny_world: Any, hidden: list[int], kind: str
) -> None:
    """Whatever stands beside a text; without hidden layers the score is embedding · weights."""
    from rlhf.examples import encode_sides, read_answers
    from rlhf.models import load_fresh_scorer

    tokenizer: Any = load_tokenizer(tiny_model_dir)
    columns = ("chosen", "rejected")
    rows = [row for row in tiny_world.preferences[0] if len(row["prompt"] + row["chosen"] + row["rejected"]) < 300][:24]
    sides = encode_sides(tokenizer, rows, columns)
    assert max(len(ids) for side in sides for ids in side) <= 128  # all that the model reads
    backbone = load_fresh_scorer(tiny_model_dir, tokenizer.pad_token_id)
    _, embeddings = read_answers(backbone, sides[0] + sides[1], 8)
    names, places = [row["id"] for row in rows], np.arange(2 * len(rows)).reshape(2, -1).T
    examples = Examples(names, names, places, [], None, 0)
    if kind == "ratings":
        examples = as_examples(np.where(np.arange(len(rows)) % 2, 1, -1))
    section = make_section(frozen=True, hidden=hidden, objective="bradley_terry", epochs=4.0)
    head = fit(tmp_path / "model", tiny_model_dir, section, examples, (embeddings, None))
    check_reward_model(tmp_path / "model", rows[:4])
    model = RewardModel(tmp_path / "model", 5)
    scores = model.score([row["prompt"] for row in rows], [row["chosen"] for row in rows])
    expected = head(torch.from_numpy(embeddings[: len(rows)])).squeeze(-1).tolist()
    assert scores == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert np.std(scores) > 1e-3
    assert model.model.config.num_labels == 1
    if not hidden:
        weights = model.model.score.weight[0].detach().numpy()
        assert type(model.model).__name__ == "LlamaForSequenceClassification"
        np.testing.assert_allclose(embeddings[: len(rows)] @ weights, scores, rtol=1e-3, atol=1e-4)
    margins = score_embedded(head, examples, embeddings)
    loss = np.logaddexp(0, -margins).mean()
    assert loss < np.log(2)  # the head has learnt something of its training labels


OUTSIDER = """
import sys
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
print(model(**tokenizer(sys.argv[2], return_tensors="pt")).logits.item())
assert "rlhf" not in sys.modules
"""


def test_a_head_with_hidden_layers_loads_where_alignflow_is_not_installed(tmp_path: Path, tiny_model_dir: Path) -> None:
    embeddings, labels = make_ratings(0, 32)
    section = make_section(frozen=True, hidden=[8], objective="bradley_terry")
    fit(tmp_path / "model", tiny_model_dir, section, as_examples(labels), (embeddings, None))
    fit(tmp_path / "twin", tiny_model_dir, section, as_examples(labels), (embeddings, None))
    for path in (tmp_path / "model").iterdir():
        content = path.read_bytes()
        assert content == (tmp_path / "twin" / path.name).read_bytes(), path.name
        assert str(tmp_path).encode() not in content
        assert str(tiny_model_dir).encode() not in content
    model = RewardModel(tmp_path / "model", 1)
    text = "Ben has 3 pens."
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", OUTSIDER, str(tmp_path / "model"), text],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(model.score_ids([model.tokenizer(text)["input_ids"]])[0], rel=1e-4)


def test_the_critic_starts_from_the_sft_model_where_the_reward_model_is_of_another_kind(
    tmp_path: Path, policy_files: Any, tiny_model_dir: Path, tiny_reward_dir: Path
) -> None:
    from dataclasses import replace

    from rlhf.params_file import load_params
    from rlhf.policies.actors import critic_start, load_own_critic
    from tests.tiny import ROOT

    embeddings, labels = make_ratings(0, 32)
    section = make_section(frozen=True, hidden=[8], objective="bradley_terry")
    fit(tmp_path, tiny_model_dir, section, as_examples(labels), (embeddings, None))
    params: Any = load_params(ROOT / "params.yaml").policies["ppo"]
    files = replace(policy_files, reward=tmp_path)
    assert critic_start(params, files) == policy_files.sft
    assert critic_start(params, policy_files) == tiny_reward_dir
    tokenizer: Any = load_tokenizer(tiny_reward_dir)
    tokenizer.add_tokens(["<new>"])
    shutil.copytree(tiny_reward_dir, tmp_path / "other tokens")
    tokenizer.save_pretrained(tmp_path / "other tokens")
    assert critic_start(params, replace(policy_files, reward=tmp_path / "other tokens")) == policy_files.sft
    assert load_own_critic(critic_start(params, files), torch.float32).num_labels == 1


def test_a_plan_on_the_diagonal_with_all_mass_is_logistic_regression() -> None:
    """Distinct points far apart and a small label weight: every rating is matched with itself."""
    from rlhf.reward_losses import OBJECTIVES, RewardBatch

    embeddings, labels = make_ratings(3, 12)
    logits = torch.linspace(-2, 2, 12, dtype=torch.float64, requires_grad=True)
    signs = torch.from_numpy(labels).to(logits)
    points = torch.from_numpy(embeddings).to(logits)
    batch = RewardBatch(
        points,
        logits,
        signs,
        1.0,
        0.2,
        torch.zeros(12),
        torch.ones(12, dtype=torch.bool),
        make_transport(label_weight=1e-6),
    )
    loss, kept = OBJECTIVES["selective"](batch)
    expected = binary_cross_entropy_with_logits(logits, (signs > 0).to(logits))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    assert kept.tolist() == pytest.approx([1.0] * 12)
    ours, theirs = (torch.autograd.grad(one, logits, retain_graph=True)[0] for one in (loss, expected))
    torch.testing.assert_close(ours, theirs)
