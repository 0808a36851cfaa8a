"""BERT to and from Hugging Face's layout, a folder of config.json and model.safetensors. The owner of safetensors.

Names and shapes are those of `transformers.BertForPreTraining`, or of `BertForMaskedLM` for a model without the
next-sentence head; a RoBERTa trained here leaves as the latter, which is the same network.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dltrain.errors import UserError
from dltrain.files import sync
from dltrain.models.bert import BertConfig, BertPretraining

# BertConfig's field -> the key in config.json. Both sides have the same defaults, so that keys may be absent.
_FIELDS = {
    "vocab": "vocab_size",
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "mlp": "intermediate_size",
    "positions": "max_position_embeddings",
    "segments": "type_vocab_size",
    "dropout": "hidden_dropout_prob",
    "layer_norm_eps": "layer_norm_eps",
    "causal": "is_decoder",
}
# What the network does and config.json could contradict, with the values that a file without the key means.
_FIXED = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "tie_word_embeddings": True,
}
_LAYER = {
    "out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}


def to_huggingface(state: dict[str, Tensor], cfg: BertConfig) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors by Hugging Face's names, and config.json, of a `BertPretraining`'s state_dict (full tensors).

    Raises UserError where the state is not one of this config's model.
    """
    _check(state, cfg, "the model's state")
    tensors = {}
    for ours, theirs in _names(cfg).items():
        for name, part in zip(theirs, state[ours].chunk(len(theirs)), strict=True):
            tensors[name] = part.detach().cpu().contiguous()
    config = {theirs: getattr(cfg, ours) for ours, theirs in _FIELDS.items()} | {
        "architectures": ["BertForPreTraining" if cfg.next_sentence else "BertForMaskedLM"],
        "model_type": "bert",
        "hidden_act": "gelu",
        "attention_probs_dropout_prob": cfg.dropout,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
    }
    return tensors, config


def from_huggingface(folder: Path | str) -> tuple[BertConfig, dict[str, Tensor]]:
    """The config and state_dict of a `BertPretraining` from a folder that transformers wrote, as stored on disk.

    The head for the next sentence is left out where the file has none. Raises UserError, naming the file, for one
    that is missing, damaged, or holds another network.
    """
    folder = Path(folder)
    tensors, config = read_huggingface(folder)
    for key, value in _FIXED.items():
        if config.get(key, value) != value:
            raise UserError(f"{folder / 'config.json'}: {key} is {config[key]!r}, but only {value!r} can be imported")
    if config.get("attention_probs_dropout_prob", 0.1) != config.get("hidden_dropout_prob", 0.1):
        raise UserError(
            f"{folder / 'config.json'}: attention_probs_dropout_prob must equal hidden_dropout_prob: edit it"
        )
    fields = {ours: config[theirs] for ours, theirs in _FIELDS.items() if theirs in config}
    cfg = BertConfig(**fields, next_sentence="cls.seq_relationship.weight" in tensors)
    # The names of TensorFlow's norms stand in files as old as the paper's own.
    tensors = {k.replace("LayerNorm.gamma", "LayerNorm.weight"): v for k, v in tensors.items()}
    tensors = {k.replace("LayerNorm.beta", "LayerNorm.bias"): v for k, v in tensors.items()}
    if missing := [name for theirs in _names(cfg).values() for name in theirs if name not in tensors]:
        raise UserError(
            f"{folder / 'model.safetensors'}: {missing[0]} is missing: not a BertForPreTraining or MaskedLM"
        )
    state = {ours: torch.cat([tensors[name] for name in theirs]) for ours, theirs in _names(cfg).items()}
    _check(state, cfg, str(folder / "model.safetensors"))
    return cfg, state


def weights_for(cfg: BertConfig, folder: Path | str, prefix: str = "") -> dict[str, Tensor]:
    """The state_dict in `folder`, `prefix` before each name. UserError, too, where it is not of `cfg`'s model."""
    theirs, state = from_huggingface(folder)
    if differ := [f"{k} is {v} there, {getattr(cfg, k)} here" for k, v in vars(theirs).items() if v != getattr(cfg, k)]:
        raise UserError(f"{folder} is of another model: {'; '.join(differ)}")
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def write_huggingface(folder: Path | str, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write a new folder, which appears whole or not at all. Raises UserError if it exists or cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder = Path(folder)
    if folder.exists():
        raise UserError(f"{folder} exists: export to a new folder, or remove it first")
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        beside.mkdir(parents=True)
        (beside / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        save_file(
            tensors, beside / "model.safetensors", metadata={"format": "pt"}
        )  # the metadata transformers asks for
        for path in (beside / "config.json", beside / "model.safetensors", beside):
            sync(path)
        beside.rename(folder)
        sync(folder.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot write: {error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _names(cfg: BertConfig) -> dict[str, tuple[str, ...]]:
    """Our parameter name -> the names of the Hugging Face tensors that make it up, one below the other."""
    modules: dict[str, tuple[str, ...]] = {
        "bert.embed.norm": ("bert.embeddings.LayerNorm",),
        "masked_lm.dense": ("cls.predictions.transform.dense",),
        "masked_lm.norm": ("cls.predictions.transform.LayerNorm",),
    }
    if cfg.next_sentence:
        modules |= {"bert.pooler": ("bert.pooler.dense",), "next_sentence": ("cls.seq_relationship",)}
    for i in range(cfg.layers):
        theirs = f"bert.encoder.layer.{i}"
        modules[f"bert.layers.{i}.qkv"] = tuple(f"{theirs}.attention.self.{x}" for x in ("query", "key", "value"))
        modules |= {f"bert.layers.{i}.{ours}": (f"{theirs}.{name}",) for ours, name in _LAYER.items()}
    names = {
        f"{o}.{kind}": tuple(f"{t}.{kind}" for t in ts) for o, ts in modules.items() for kind in ("weight", "bias")
    }
    return names | {
        "bert.embed.token.weight": ("bert.embeddings.word_embeddings.weight",),
        "bert.embed.position.weight": ("bert.embeddings.position_embeddings.weight",),
        "bert.embed.segment.weight": ("bert.embeddings.token_type_embeddings.weight",),
        "masked_lm.decoder.bias": ("cls.predictions.bias",),
    }


def _check(state: dict[str, Tensor], cfg: BertConfig, where: str) -> None:
    """UserError unless names and shapes are those of this config's model."""
    with torch.device("meta"):
        expected = {name: tuple(p.shape) for name, p in BertPretraining(cfg).named_parameters()}
    found = {name: tuple(t.shape) for name, t in state.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"{where}: {name} has shape {found.get(name)}, but the config asks for {expected.get(name)}"
            )


def read_huggingface(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, by the names that they have there, and config.json. Raises UserError, naming the file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for path in (folder / "config.json", folder / "model.safetensors"):
        if not path.is_file():
            raise UserError(f"{path} is missing: name a folder that transformers' save_pretrained wrote")
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'} is not JSON: {error}") from error
    try:
        return load_file(folder / "model.safetensors"), config
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / 'model.safetensors'} is damaged: {error}") from error
