"""GPT-2 to and from Hugging Face's layout: names and shapes of `transformers.GPT2LMHeadModel`.

Its linear layers keep their weights as [inputs, outputs] (a "Conv1D", as GPT-2's TensorFlow code has them).
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dltrain.errors import UserError
from dltrain.models.exchange import read_huggingface
from dltrain.models.gpt import Gpt, GptConfig

# GptConfig's field -> the key in config.json. Both sides have the same defaults, so that keys may be absent.
_FIELDS = {
    "vocab": "vocab_size",
    "layers": "n_layer",
    "width": "n_embd",
    "heads": "n_head",
    "positions": "n_positions",
    "dropout": "resid_pdrop",
}
# What the network does and config.json could contradict, with the values that a file without the key means.
_FIXED = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "n_inner": None,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
    "add_cross_attention": False,
}
_LAYER = {
    "attention_norm": "ln_1",
    "qkv": "attn.c_attn",
    "out": "attn.c_proj",
    "mlp_norm": "ln_2",
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
}
_TURNED = tuple(f"{name}.weight" for name in ("qkv", "out", "up", "down"))  # how the names of turned tensors end


def to_huggingface(state: dict[str, Tensor], cfg: GptConfig) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors by Hugging Face's names, and config.json, of a `Gpt`'s state_dict (full tensors).

    Raises UserError where the state is not one of this config's model, or the model is not a GPT-2.
    """
    if cfg.post_norm:
        raise UserError("a GPT with its norms behind the sublayers is no GPT-2: it cannot be exported")
    if cfg.base_width:
        raise UserError("a GPT of muP has multipliers that a GPT-2 has not: it cannot be exported")
    _check(state, cfg, "the model's state")
    tensors = {theirs: _turned(ours, state[ours].detach().cpu()) for ours, theirs in _names(cfg).items()}
    config = {theirs: getattr(cfg, ours) for ours, theirs in _FIELDS.items()} | {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "attn_pdrop": cfg.dropout,
        "embd_pdrop": cfg.dropout,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
    }
    return tensors, config


def from_huggingface(folder: Path | str) -> tuple[GptConfig, dict[str, Tensor]]:
    """The config and state_dict of a `Gpt` from a folder that transformers wrote, or from one of OpenAI's own GPT-2s.

    Raises UserError, naming the file, for one that is missing, damaged, or holds another network.
    """
    folder = Path(folder)
    tensors, config = read_huggingface(folder)
    for key, value in _FIXED.items():
        if config.get(key, value) != value:
            raise UserError(f"{folder / 'config.json'}: {key} is {config[key]!r}, but only {value!r} can be imported")
    cfg = GptConfig(**{ours: config[theirs] for ours, theirs in _FIELDS.items() if theirs in config})
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}  # old files have none
    names = {ours: theirs.removeprefix("transformer.") for ours, theirs in _names(cfg).items()}
    if missing := [name for name in names.values() if name not in tensors]:
        raise UserError(f"{folder / 'model.safetensors'}: {missing[0]} is missing: not a GPT2LMHeadModel")
    state = {ours: _turned(ours, tensors[theirs]) for ours, theirs in names.items()}
    _check(state, cfg, str(folder / "model.safetensors"))
    return cfg, state


def weights_for(cfg: GptConfig, folder: Path | str) -> dict[str, Tensor]:
    """The state_dict in `folder`. Raises UserError, as `from_huggingface` and where it is not of `cfg`'s model."""
    theirs, state = from_huggingface(folder)
    fields = [name for name in vars(theirs) if name != "dropout"]  # which is of the training, not of the weights
    if differ := [f"{k} is {a} there, {b} here" for k in fields if (a := getattr(theirs, k)) != (b := getattr(cfg, k))]:
        raise UserError(f"{folder} is of another model: {'; '.join(differ)}")
    return state


def _turned(ours: str, tensor: Tensor) -> Tensor:
    return (tensor.T if ours.endswith(_TURNED) else tensor).contiguous()


def _names(cfg: GptConfig) -> dict[str, str]:
    """Our parameter name -> the name of the Hugging Face tensor."""
    modules = {"norm": "transformer.ln_f"}
    for i in range(cfg.layers):
        modules |= {f"layers.{i}.{ours}": f"transformer.h.{i}.{theirs}" for ours, theirs in _LAYER.items()}
    names = {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in modules.items() for kind in ("weight", "bias")}
    return names | {"token.weight": "transformer.wte.weight", "position.weight": "transformer.wpe.weight"}


def _check(state: dict[str, Tensor], cfg: GptConfig, where: str) -> None:
    """UserError unless names and shapes are those of this config's model."""
    with torch.device("meta"):
        expected = {name: tuple(p.shape) for name, p in Gpt(cfg).named_parameters()}
    found = {name: tuple(t.shape) for name, t in state.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"{where}: {name} has shape {found.get(name)}, but the config asks for {expected.get(name)}"
            )
