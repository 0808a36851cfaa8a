"""The classic networks for images by name, each with the keywords of its family's function."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from dltrain.errors import UserError
from dltrain.models.alexnet import alexnet, alexnet_owt, fig1
from dltrain.models.highway import highway
from dltrain.models.inception import googlenet, googlenet_bn, inception_bn
from dltrain.models.lenet import lenet
from dltrain.models.resnet import resnet
from dltrain.models.speedrun import Speedrun
from dltrain.models.vgg import vgg

NAMES = """lenet, alexnet, alexnet-owt, fig1, vgg11|13|16|19, googlenet, googlenet-bn, inception-bn, highway-N,
speedrun, resnet-18|34|50|101|152, plain-18|34, and for CIFAR resnet-N, plain-N with N = 6n + 2: 20 ... 1202"""


def image_model(name: str, classes: int, side: int, **options: Any) -> nn.Module:
    """A network from images_BCHW, of `side` x `side` pixels and 3 channels, to logits_BK.

    In training GoogLeNet gives a tuple: the logits, and those of its two other heads. `options` are keywords of the
    family's function: `width` (fig1, highway, speedrun, resnet, plain), `dropout` (alexnet, fig1, vgg, googlenet,
    inception), `activation` (fig1), `gate` (highway), `zero_gamma` (resnet, plain).

    Raises UserError for a name or an option that there is not, and for images too small or too large for the network.
    """
    build = _builder(name)
    if unknown := options.keys() - inspect.signature(build).parameters.keys():
        raise UserError(f"{name} has no {', '.join(sorted(unknown))}: leave it out, or take another model")
    try:
        return build(classes, side, **options)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error


def _builder(name: str) -> Callable[..., nn.Module]:
    match name.split("-"):
        case ["lenet"]:
            return lenet
        case ["alexnet"]:
            return alexnet
        case ["alexnet", "owt"]:
            return alexnet_owt
        case ["fig1"]:
            return fig1
        case ["vgg11" | "vgg13" | "vgg16" | "vgg19"]:
            return partial(vgg, int(name[3:]))
        case ["googlenet"]:
            return googlenet
        case ["googlenet", "bn"]:
            return googlenet_bn
        case ["inception", "bn"]:
            return inception_bn
        case ["highway", layers] if layers.isdecimal():
            return partial(highway, int(layers))
        case ["speedrun"]:
            return Speedrun
        case ["resnet", depth] if depth.isdecimal():
            return partial(resnet, int(depth))
        case ["plain", depth] if depth.isdecimal():
            return partial(resnet, int(depth), residual=False)
    raise UserError(f"there is no image model {name!r}: take one of {' '.join(NAMES.split())}")
