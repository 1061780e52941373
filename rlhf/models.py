"""Loading, saving and adapting models, and the settings every trainer shares."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from rlhf.errors import UserError, first_line
from rlhf.params import AdapterParams, EmbedParams, TrainingParams
from rlhf.team import check_share, join_team, process_count

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

MERGE_TOLERANCE = 1e-3
"""How far merged logits may lie from the adapter's, in units of the largest logit."""


def set_determinism(seed: int) -> None:
    """Seed every generator and ask torch for algorithms that give the same bits twice."""
    import torch
    from transformers import set_seed

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Filling every fresh buffer with NaN would take most of TRL's loss; it finds bugs and changes no result.
    switches: Any = torch.utils.deterministic
    switches.fill_uninitialized_memory = False
    set_seed(seed)


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder; where it has no padding token, the end token pads.

    Raises UserError where the folder holds no tokenizer or the tokenizer has no end token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{folder} holds no tokenizer ({first_line(error)}); give a model folder or a hub id"
        ) from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer in {folder} has no end token; set eos_token in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_causal(folder: Path | str, section: TrainingParams | None = None) -> PreTrainedModel:
    """The language model of a folder, in evaluation mode: to train as `section` says, else in fp32.

    Raises UserError where the folder holds none, or this machine cannot quantise.
    """
    from transformers import AutoModelForCausalLM

    return _load(AutoModelForCausalLM, folder, section).eval()


def load_scorer(folder: Path | str, section: TrainingParams | EmbedParams | None = None) -> PreTrainedModel:
    """A model with one score per text, loaded like a language model; a causal folder gets a fresh head."""
    from transformers import AutoModelForSequenceClassification

    import rlhf.mlp_scorer  # noqa: F401 - makes the class of heads with hidden layers known

    return _load(AutoModelForSequenceClassification, folder, section, num_labels=1).eval()


def load_fresh_scorer(
    folder: Path | str, padding: int, section: TrainingParams | EmbedParams | None = None
) -> PreTrainedModel:
    """A model with a score head of zeros: no answer is preferred before a label has been seen.

    Raises UserError where the model reads its score from something else than the last token's state.
    """
    import torch

    with fresh_head_expected():
        model: Any = load_scorer(folder, section)
    head = getattr(model, "score", None)
    if not isinstance(head, torch.nn.Linear):
        raise UserError(
            f"{folder} is a {type(model).__name__}, which scores no text by its last token; name a causal model"
        )
    model.config.pad_token_id = padding
    torch.nn.init.zeros_(head.weight)
    return model


def weight_settings(section: TrainingParams | EmbedParams | None) -> dict[str, Any]:
    """`dtype` and quantisation (QLoRA) in which a model to train is loaded; without a section, fp32.

    Only what is frozen, under an adapter or for good, has fewer bits: bf16 would round most updates of trained weights
    away.
    Raises UserError where this machine cannot quantise.
    """
    adapter = section.adapter if isinstance(section, TrainingParams) else None
    is_frozen = isinstance(section, EmbedParams) or adapter is not None
    settings: dict[str, Any] = {
        "dtype": "bfloat16" if section and is_frozen and section.precision == "bf16" else "float32"
    }
    if adapter and adapter.quantise:
        settings["quantization_config"] = _quantisation(adapter.quantise)
    return settings


def _quantisation(kind: str) -> BitsAndBytesConfig:
    import importlib.util

    import torch
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None or not torch.cuda.is_available():
        raise UserError(
            f"adapter.quantise is {kind!r} but this machine lacks a CUDA device or the package "
            "bitsandbytes; install it there, or set adapter.quantise to null"
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _load(auto_class: Any, folder: Path | str, section: TrainingParams | EmbedParams | None, **settings: Any) -> Any:
    settings |= weight_settings(section)
    try:
        model = auto_class.from_pretrained(folder, **settings)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{folder} is no model that transformers can load ({first_line(error)}); "
            "give a folder with config.json and model.safetensors, or a hub id"
        ) from error
    if model.config.pad_token_id is None:
        model.config.pad_token_id = load_tokenizer(folder).pad_token_id
    return model


@contextmanager
def fresh_head_expected() -> Iterator[None]:
    """Load without transformers' warning that the head is missing, where it must be."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


@contextmanager
def own_generation_habits_off(model: Any) -> Iterator[None]:
    """Set aside the model's own generation_config: a repetition penalty in it would bend what is measured."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write weights, configuration and tokenizer, nothing else, so that equal models have equal bytes.

    Of several processes, which all come here, the main one writes while the others wait.
    """

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    join_team().from_main(write)


@overload
def lora_config(adapter: AdapterParams, task: str) -> LoraConfig: ...
@overload
def lora_config(adapter: None, task: str) -> None: ...
def lora_config(adapter: AdapterParams | None, task: str) -> LoraConfig | None:
    """PEFT's configuration of an adapter, None for none; `task` is PEFT's task type, `CAUSAL_LM` or `SEQ_CLS`."""
    from peft import LoraConfig

    if adapter is None:
        return None
    return LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=adapter.target_modules,
        # The critic's head is trained whole; PEFT knows that of reward models, but not of token scorers.
        exclude_modules=["score", "classifier"] if task == "TOKEN_CLS" else None,
        task_type=task,
    )


@contextmanager
def adapters_kept(model: Any) -> Iterator[None]:
    """Switch adapters inside; PEFT freezes one that it switches off, afterwards all train as before."""
    trained = [value for value in model.parameters() if value.requires_grad]
    try:
        yield
    finally:
        for value in trained:
            value.requires_grad_(True)


@contextmanager
def target_modules_named(adapter: AdapterParams | None) -> Iterator[None]:
    """Build a model under an adapter. Raises UserError where it lacks the modules that `target_modules` names."""
    try:
        yield
    except ValueError as error:
        if adapter is None or "target modules" not in str(error).lower():
            raise
        raise UserError(
            f"adapter.target_modules is {adapter.target_modules!r}, which does not fit the model "
            f"({first_line(error)}); set it to all-linear, or to names of the model's linear layers"
        ) from error


def merge_adapter(model: Any, sample: dict[str, Any]) -> PreTrainedModel:
    """Fold a PEFT adapter into its base model and check that the logits on `sample` stay.

    Raises UserError where merging moves a logit by more than MERGE_TOLERANCE of the largest one.
    """
    import torch

    model.eval()
    with torch.inference_mode():
        before = model(**sample).logits.float()
    merged = model.merge_and_unload()
    with torch.inference_mode():
        after = merged(**sample).logits.float()
    drift = ((before - after).abs().max() / before.abs().max().clamp_min(1e-6)).item()
    if not drift <= MERGE_TOLERANCE:
        raise UserError(
            f"merging the adapter moves logits by {drift:.1e} of their size, more than {MERGE_TOLERANCE:g}; "
            "train in fp32 or without quantisation"
        )
    return merged


def on_device(model: Any) -> Any:
    """The model where models compute on this machine: the GPU, where there is one."""
    import torch

    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def trained_weights(model: Any) -> dict[str, Any]:
    """The parameters that are trained, by name; under an adapter those of the adapter alone."""
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def put_back(weights: dict[str, Any], values: dict[str, Any]) -> None:
    """Give parameters the values they had, where `values` has their names."""
    import torch

    with torch.no_grad():
        for name, value in weights.items():
            if name in values:
                value.copy_(values[name])


def trainer_settings(section: TrainingParams, seed: int, folder: Path) -> dict[str, Any]:
    """Arguments common to all of TRL's configurations; every default that bites is set.

    A batch is that of all processes together: a launcher with more of them changes no result.
    Raises UserError where they cannot share it evenly.
    """
    import torch

    check_share("batch_size", section.batch_size)
    return {
        "output_dir": str(folder),
        "seed": seed,
        "data_seed": seed,
        "learning_rate": section.learning_rate,
        "lr_scheduler_type": section.lr_scheduler,
        "warmup_steps": section.warmup_share if section.warmup_share < 1 else 0.999,
        "weight_decay": section.weight_decay,
        "max_grad_norm": section.max_grad_norm,
        "per_device_train_batch_size": section.batch_size // process_count(),
        "per_device_eval_batch_size": section.batch_size // process_count(),
        "gradient_accumulation_steps": section.gradient_accumulation_steps,
        "activation_checkpointing": section.gradient_checkpointing,
        # Said aloud, or the trainer refuses bf16 without a GPU.
        "use_cpu": not torch.cuda.is_available(),
        "bf16": section.precision == "bf16",
        "report_to": "none",
        "save_strategy": "no",
        # Every weight that is trained is part of every loss; looking for others would cost a pass over the graph.
        "ddp_find_unused_parameters": False,
        "logging_steps": 10,
        "dataloader_pin_memory": False,
    }
