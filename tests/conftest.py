"""Fixtures shared by all tests: tiny models made on the spot, the real ones where they are at hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tasks.paths import Paths

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"

# Set before torch is imported anywhere: one thread gives the same bits on every machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")


@pytest.fixture(scope="session")
def world_params():
    """The world of params.yaml with a model that trains in a second."""
    from rlhf.params_file import load_params

    world = load_params(ROOT / "params.yaml").prepare.world
    pretraining = world.pretraining.model_copy(
        update={"hidden_size": 16, "layers": 2, "heads": 2, "problems": 200, "drills": 200, "steps": 2, "batch_size": 2}
    )
    sizes = {"demonstrations": 40, "pairs": 60, "prompts": 24, "test_prompts": 16}
    return world.model_copy(update={"pretraining": pretraining, **sizes})


@pytest.fixture(scope="session")
def tiny_world(world_params):
    from rlhf.data.world import make_world

    return make_world(world_params, 17)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory, world_params, tiny_world) -> Path:
    """A Llama with 16 hidden units and random weights, and the world's tokenizer."""
    from rlhf.models import save_model
    from rlhf.pretraining import build_model, train_tokenizer

    tokenizer = train_tokenizer([story + rest for story, rest in tiny_world.texts], 300, 128)
    folder = tmp_path_factory.mktemp("tiny-model")
    save_model(build_model(world_params.pretraining, tokenizer, 0), tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_reward_dir(tmp_path_factory, tiny_model_dir) -> Path:
    """A reward model with random weights on the same tokenizer."""
    from rlhf.models import load_scorer, load_tokenizer, save_model, set_determinism

    set_determinism(1)
    folder = tmp_path_factory.mktemp("tiny-reward")
    save_model(load_scorer(tiny_model_dir), load_tokenizer(tiny_model_dir), folder)
    return folder


@pytest.fixture(scope="session")
def policy_files(tmp_path_factory, tiny_model_dir, tiny_reward_dir, tiny_world):
    """What a policy learns from: the tiny models and the tiny world's rows."""
    from rlhf.data.formats import write_rows
    from rlhf.policies import PolicyFiles

    folder = tmp_path_factory.mktemp("policy-data")
    write_rows(folder / "prompts.jsonl", tiny_world.prompts[0])
    write_rows(folder / "preferences.jsonl", tiny_world.preferences[0])
    return PolicyFiles(tiny_model_dir, tiny_reward_dir, folder / "prompts.jsonl", folder / "preferences.jsonl", folder)


@pytest.fixture
def workspace(tmp_path: Path) -> Paths:
    """A workspace with a base model's tokenizer (a word is a token) and configuration, and sound rows of each kind."""
    from tests.validation import make_workspace

    return make_workspace(tmp_path)


@pytest.fixture(scope="session")
def stories_dir() -> Path:
    folder = SHARED / "models" / "stories260K"
    if not folder.exists():
        pytest.skip(f"the real model stories260K is not at {folder}")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _keeper_ends_with_the_tests():
    """A flow in the tests' own process starts the keeper, which otherwise waits for the end of that process."""
    from tasks import processes

    yield
    if processes._keeper is not None:
        processes._keeper.communicate()
