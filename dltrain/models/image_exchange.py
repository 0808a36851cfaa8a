"""AlexNet (one column), VGG, GoogLeNet and ResNets to and from the names of torchvision, which timm reads too.

Published weights expect images as their publisher prepares them, which no file says: torchvision's have the channels'
ImageNet mean and deviation taken out. Its GoogLeNet's expect (x - 0.5) / 0.5, and its other two heads are untrained.

Tried with torchvision 0.29.2 (all eleven networks) and timm 1.0.31 (resnet18, resnet50, vgg11): the same logits, within
2e-6 for timm's VGG and to the bit for the others, from random weights, on a CPU.
"""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dltrain.errors import UserError
from dltrain.models.alexnet import AlexNet
from dltrain.models.exchange import read_huggingface
from dltrain.models.image import image_model
from dltrain.models.inception import InceptionNet
from dltrain.models.resnet import Block, ResNet
from dltrain.models.vgg import Vgg

_KINDS = (("conv", "conv"), ("norm", "bn"))
_TIMM = {"pre_logits.fc1.": "classifier.0.", "pre_logits.fc2.": "classifier.3.", "head.fc.": "classifier.6."}
_GOOGLENET = ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b")


def to_torchvision(model: nn.Module, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors of `model`, or of `state` in its names, by torchvision's names. UserError for another network."""
    state = model.state_dict() if state is None else state
    return {theirs: state[ours].detach().contiguous() for ours, theirs in _names(model).items()}


def to_timm(model: nn.Module, architecture: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and config.json of a folder that timm's create_model reads ("local-dir:FOLDER"), for write_huggingface.

    `architecture` is timm's name: resnet18 ... resnet152, vgg11 ... vgg19.
    """
    tensors = to_torchvision(model)
    classes = list(tensors.values())[-1].shape[0]
    return tensors, {"architecture": architecture, "num_classes": classes}


def from_torchvision(model: nn.Module, path: Path | str) -> dict[str, Tensor]:
    """The state_dict of `model` from a .pth file of torchvision's, or a folder with config.json and model.safetensors.

    GoogLeNet's two other heads are left out where the file has none. Raises UserError, naming the file, for one that is
    missing, damaged, or holds another network.
    """
    path = Path(path)
    tensors = read_huggingface(path)[0] if path.is_dir() else _read_pth(path)
    return _ours(model, tensors, path)


def weights_for(name: str, classes: int, side: int, path: Path | str, prefix: str = "") -> dict[str, Tensor]:
    """As `from_torchvision` for an image model by name, `prefix` before each tensor's: what `Run.prepare` takes."""
    with torch.device("meta"):
        model = image_model(name, classes, side)
    return {f"{prefix}{ours}": tensor for ours, tensor in from_torchvision(model, path).items()}


def _ours(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    tensors = dict(_from_timm(name, tensor) for name, tensor in tensors.items())
    expected, found = model.state_dict(), {}
    names = _names(model)
    for ours, theirs in names.items():
        shape = tuple(tensors[theirs].shape) if theirs in tensors else "missing"
        if shape == tuple(expected[ours].shape):
            found[ours] = tensors[theirs]
        elif shape == "missing" and ours.startswith("heads."):
            continue
        elif shape == "missing" and ours.endswith("num_batches_tracked"):  # in none of the older files
            found[ours] = torch.zeros((), dtype=torch.int64)
        else:
            raise UserError(f"{path}: {theirs} is {shape}, but the model asks for {tuple(expected[ours].shape)}")
    if other := tensors.keys() - names.values():
        raise UserError(f"{path}: holds another network: it has {min(other)}, which the model has not")
    return found


def _read_pth(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{path} is missing: name a .pth file, or a folder with config.json and model.safetensors")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is damaged, or no file of tensors: {str(error).splitlines()[0]}") from error


def _from_timm(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """timm's VGG calls its linear layers otherwise, and keeps two of them as convolutions."""
    for theirs, torchvisions in _TIMM.items():
        if name.startswith(theirs):
            return name.replace(theirs, torchvisions), tensor.flatten(1) if tensor.ndim == 4 else tensor
    return name, tensor


def _names(model: nn.Module) -> dict[str, str]:
    """Our name -> torchvision's, in our order."""
    match model:
        case ResNet(projected=True):
            modules = _resnet(model)
        case AlexNet(normed=False):
            modules = _stacked((0, 3, 6, 8, 10), (1, 4, 6))
        case Vgg():
            modules = _stacked(_vgg_places(model), (0, 3, 6))
        case InceptionNet(normed=False) if model.heads:
            modules = _googlenet()
        case _:
            raise UserError("torchvision has only alexnet-owt, vgg11 to vgg19, googlenet-bn, resnet-18 to resnet-152")
    split = {name: name.rpartition(".") for name in model.state_dict()}
    return {name: f"{modules[module]}.{tensor}" for name, (module, _, tensor) in split.items()}


def _resnet(model: ResNet) -> dict[str, str]:
    modules, stage, place = {"conv": "conv1", "norm": "bn1", "fc": "fc"}, 1, -1
    for i, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        stage, place = (stage + 1, 0) if block.stride == 2 else (stage, place + 1)
        ours, theirs = f"blocks.{i}", f"layer{stage}.{place}"
        for j in range(len(block.convs)):
            modules |= {f"{ours}.convs.{j}": f"{theirs}.conv{j + 1}", f"{ours}.norms.{j}": f"{theirs}.bn{j + 1}"}
        modules |= {f"{ours}.project.{j}": f"{theirs}.downsample.{j}" for j in (0, 1)}
    return modules


def _stacked(convs: Sequence[int], linears: Sequence[int]) -> dict[str, str]:
    """Of nn.Sequentials in which layers stand at these places."""
    modules = {f"convs.{i}": f"features.{place}" for i, place in enumerate(convs)}
    ours = ("classifier.hidden.0", "classifier.hidden.1", "classifier.fc")
    return modules | {name: f"classifier.{place}" for name, place in zip(ours, linears, strict=True)}


def _vgg_places(model: Vgg) -> list[int]:
    """Each convolution has a ReLU behind it, and the last of its size a pooling too."""
    places = [0]
    for i in range(len(model.convs) - 1):
        places.append(places[-1] + (3 if i in model.last else 2))
    return places


def _googlenet() -> dict[str, str]:
    units = {f"stem.{i}": f"conv{i + 1}" for i in range(3)}
    for i, block in enumerate(_GOOGLENET):
        ours, theirs = f"blocks.{i}", f"inception{block}"
        units |= {f"{ours}.one": f"{theirs}.branch1", f"{ours}.pooled": f"{theirs}.branch4.1"}
        for branch, their_branch in (("three", "branch2"), ("five", "branch3")):
            units |= {f"{ours}.{branch}.{j}": f"{theirs}.{their_branch}.{j}" for j in (0, 1)}
    units |= {f"heads.{i}.conv": f"aux{i + 1}.conv" for i in (0, 1)}
    modules = {f"{ours}.{kind}": f"{theirs}.{k}" for ours, theirs in units.items() for kind, k in _KINDS}
    for i in (0, 1):
        modules |= {f"heads.{i}.hidden": f"aux{i + 1}.fc1", f"heads.{i}.fc": f"aux{i + 1}.fc2"}
    return modules | {"fc": "fc"}
