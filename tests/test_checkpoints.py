"""Resume that is proved: a training that was stopped ends at the same bytes and curves as one that was not."""

import logging
import math
import pickle
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from rlhf.checkpoints import Checkpoints, random_state, set_random_state, training_key
from rlhf.curves import CurveRecorder, no_log
from rlhf.models import load_tokenizer, save_model
from rlhf.params import AdapterParams, AdaptiveBeta, DynamicSampling, RewardMix, Weight
from rlhf.params_file import load_params
from rlhf.policies import train_policy
from tasks import policy as stage
from tasks.paths import Paths
from tests.tiny import tiny_params, write_params

ROOT = Path(__file__).parent.parent
ADAPTER = AdapterParams(rank=2, alpha=4, dropout=0.0, target_modules="all-linear", quantise=None)
MOVING = {"score_scaling": "running", "adaptive_beta": AdaptiveBeta(target=0.5, horizon=40), "lr_scheduler": "cosine"}
"""Settings under which more than weights changes from rollout to rollout."""
REFILLED = {
    "advantage": "leave_one_out",
    "group_size": 4,
    "dynamic_sampling": DynamicSampling(max_refills=2),
    "rewards": RewardMix(answer=Weight(weight=1.0)),
}
"""A model this small answers nothing rightly: only the penalty of a missing end tells its answers apart."""

KILLED = """
import os, pickle, signal, sys
from pathlib import Path
from rlhf.checkpoints import Checkpoints
from rlhf.policies import train_policy
section, files, folder = pickle.load(sys.stdin.buffer)
def log(figures, step):
    if step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
train_policy(section, files, 5, log, Checkpoints(folder, 0, float("inf")))
"""


@pytest.fixture
def params():
    section = load_params(ROOT / "params.yaml").policies["ppo"]
    sizes = {"steps": 6, "batch_size": 8, "minibatches": 2, "max_new_tokens": 6, "learning_rate": 0.01}
    return section.model_copy(update=sizes | MOVING)


def always(folder):
    """Checkpoints after every step."""
    return Checkpoints(folder, 0, math.inf)


def stop_at_four(figures, step):
    if step == 4:
        raise KeyboardInterrupt


def train(section, files, checkpoints, folder, log=no_log):
    """Train as the stage does; returns the bytes of the model and of its curves."""
    curves = CurveRecorder(log)
    model = train_policy(section, files, 5, curves, checkpoints)
    save_model(model, load_tokenizer(files.sft), folder)
    curves.write(folder / "curves.csv")
    return (folder / "model.safetensors").read_bytes(), (folder / "curves.csv").read_text(), curves.rows


@pytest.mark.parametrize(
    "changes",
    [{}, {"critic": "shared"}, {"adapter": ADAPTER, "critic": "adapter"}, {"advantage": "reward"}, REFILLED],
    ids=["separate", "shared", "adapter", "none", "refilled"],
)
def test_a_stopped_training_ends_where_an_uninterrupted_one_does(params, policy_files, tmp_path, caplog, changes):
    caplog.set_level(logging.INFO)
    section = params.model_copy(update=changes)
    expected = train(section, policy_files, None, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(section, policy_files, always(tmp_path / "state"), tmp_path / "stopped", stop_at_four)
    steps = []
    resumed = train(
        section,
        policy_files,
        always(tmp_path / "state"),
        tmp_path / "resumed",
        lambda figures, step: steps.append(step),
    )
    assert resumed == expected
    if section.dynamic_sampling:
        assert all(row["groups/refills"] > 0 for row in expected[2].values())
    assert "000000003.pt" in caplog.text
    assert steps == [1, 2, 3, 4, 5, 6]  # the listener hears of the steps before the stop too


def test_a_killed_process_goes_on(params, policy_files, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED],
        input=pickle.dumps((params, policy_files, tmp_path / "state")),
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert [path.stem for path in sorted((tmp_path / "state").rglob("*.pt"))] == ["000000002", "000000003"]
    resumed = train(params, policy_files, always(tmp_path / "state"), tmp_path / "resumed")
    assert resumed == train(params, policy_files, None, tmp_path / "whole")


def test_other_params_seeds_and_data_start_afresh(params, policy_files, tmp_path, caplog):
    with pytest.raises(KeyboardInterrupt):
        train(params, policy_files, always(tmp_path / "state"), tmp_path / "stopped", stop_at_four)
    key = training_key(params, 5, [policy_files.sft, policy_files.prompts, policy_files.reward])
    other = tmp_path / "prompts.jsonl"
    other.write_bytes(policy_files.prompts.read_bytes().replace(b"a", b"b", 1))
    for different in (
        training_key(params.model_copy(update={"beta": 0.06}), 5, [policy_files.sft, policy_files.prompts]),
        training_key(params, 6, [policy_files.sft, policy_files.prompts, policy_files.reward]),
        training_key(params, 5, [policy_files.sft, other, policy_files.reward]),
    ):
        assert different != key
    section = params.model_copy(update={"beta": 0.06, "steps": 1})
    with caplog.at_level(logging.INFO):
        afresh = train(section, policy_files, always(tmp_path / "state"), tmp_path / "afresh")
    assert "starting afresh" in caplog.text
    assert afresh == train(section, policy_files, None, tmp_path / "whole")


def test_a_key_knows_bytes_and_names_but_no_places(params, policy_files, tmp_path):
    copy = shutil.copytree(policy_files.sft, tmp_path / "elsewhere")
    assert training_key(params, 0, [copy]) == training_key(params, 0, [policy_files.sft])
    (copy / "config.json").rename(copy / "settings.json")
    assert training_key(params, 0, [copy]) != training_key(params, 0, [policy_files.sft])


def test_half_written_checkpoints_are_passed_over(tmp_path, caplog):
    checkpoints = always(tmp_path)
    assert checkpoints.resume("key") is None
    for step in (1, 2, 3):
        checkpoints.offer(step, lambda step=step: {"step": step})
    newest = tmp_path / "key" / "000000003.pt"
    newest.write_bytes(newest.read_bytes()[:-40])
    (tmp_path / "key" / "000000004.partial").write_bytes(b"half")
    with caplog.at_level(logging.WARNING):
        assert always(tmp_path).resume("key") == {"step": 2}
    assert "000000003.pt is unreadable" in caplog.text


def test_a_write_that_fails_leaves_the_last_checkpoint(tmp_path):
    checkpoints = always(tmp_path)
    checkpoints.resume("key")
    checkpoints.offer(1, lambda: {"step": 1})
    with pytest.raises(AttributeError):
        checkpoints.offer(2, lambda: {"step": lambda: 2})
    assert always(tmp_path).resume("key") == {"step": 1}


def test_nothing_is_written_before_it_is_due_and_nothing_stays_after_the_end(tmp_path):
    early = Checkpoints(tmp_path / "state", 3600, 0.05)
    early.resume("key")
    early.offer(1, lambda: pytest.fail("not due"))
    due = always(tmp_path / "state")
    due.resume("key")
    due.offer(1, lambda: {"step": 1})
    assert list((tmp_path / "state").rglob("*.pt"))
    due.clear()
    assert not (tmp_path / "state").exists()
    due.clear()


def test_random_numbers_go_on_where_they_were(tmp_path):
    def draw():
        return random.random(), numpy.random.rand(), numpy.random.randn(), torch.rand(1).item()

    draw()
    torch.save(random_state(), tmp_path / "state.pt")
    expected = draw()
    assert draw() != expected
    set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draw() == expected


def test_the_stage_removes_its_checkpoints_when_its_results_are_saved(policy_files, tmp_path, monkeypatch):
    write_params(tmp_path / "params.yaml", tiny_params())
    params = load_params(tmp_path / "params.yaml")
    paths = Paths(tmp_path)
    shutil.copytree(policy_files.sft, paths.model("sft"))
    shutil.copytree(policy_files.reward, paths.model("reward"))
    paths.rows("prompts", "train").parent.mkdir(parents=True)
    shutil.copy(policy_files.prompts, paths.rows("prompts", "train"))
    monkeypatch.setattr(stage, "CHECKPOINTS", {"seconds": 0, "share": math.inf})
    seen = []

    def watch(figures, step):
        seen.append(len(list(paths.state.rglob("*.pt"))))

    stage.run(params, paths, watch, "ppo")
    assert seen == [0, 1]
    assert (paths.model("policy", "ppo") / "model.safetensors").exists()
    assert not list(paths.state.rglob("*.pt"))
