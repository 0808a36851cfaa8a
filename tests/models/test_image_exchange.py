"""Names and shapes as torchvision and timm publish them; equal logits with transformers' ResNet through those names."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dltrain.errors import UserError
from dltrain.models.exchange import write_huggingface
from dltrain.models.image import image_model
from dltrain.models.image_exchange import from_torchvision, to_timm, to_torchvision, weights_for

BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
PUBLISHED = {  # some of the names and shapes in torchvision's files
    "alexnet-owt": {
        "features.0.weight": (64, 3, 11, 11), "features.3.weight": (192, 64, 5, 5), "features.10.bias": (256,),
        "classifier.1.weight": (4096, 9216), "classifier.4.bias": (4096,), "classifier.6.weight": (1000, 4096),
    },
    "vgg16": {
        "features.0.weight": (64, 3, 3, 3), "features.2.bias": (64,), "features.5.weight": (128, 64, 3, 3),
        "features.14.weight": (256, 256, 3, 3), "features.28.weight": (512, 512, 3, 3),
        "classifier.0.weight": (4096, 25088), "classifier.3.weight": (4096, 4096), "classifier.6.bias": (1000,),
    },
    "googlenet-bn": {
        "conv1.conv.weight": (64, 3, 7, 7), "conv3.bn.running_var": (192,),
        "inception3a.branch1.conv.weight": (64, 192, 1, 1), "inception4e.branch2.1.conv.weight": (320, 160, 3, 3),
        "inception5b.branch3.1.bn.bias": (128,), "inception5b.branch4.1.conv.weight": (128, 832, 1, 1),
        "aux1.conv.conv.weight": (128, 512, 1, 1), "aux2.fc1.weight": (1024, 2048), "aux2.fc2.weight": (1000, 1024),
        "fc.weight": (1000, 1024),
    },
    "resnet-50": {
        "conv1.weight": (64, 3, 7, 7), "bn1.running_mean": (64,), "layer1.0.conv3.weight": (256, 64, 1, 1),
        "layer1.0.downsample.0.weight": (256, 64, 1, 1), "layer1.0.downsample.1.weight": (256,),
        "layer2.0.conv2.weight": (128, 128, 3, 3), "layer4.2.bn3.num_batches_tracked": (), "fc.bias": (1000,),
    },
}  # fmt: skip


def model_of(name: str, classes: int = 5, side: int = 65, **options) -> nn.Module:
    """Weights and statistics for which a swapped or forgotten one shows."""
    torch.manual_seed(1)
    model = image_model(name, classes, side, **options).eval()
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.is_floating_point():
            tensor.add_(torch.randn_like(tensor) * 0.1)
    return model


def saved(path: Path, tensors: dict[str, Tensor]) -> Path:
    torch.save(tensors, path)
    return path


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_are_those_that_are_published(name):
    with torch.device("meta"):
        model = image_model(name, 1000, 224)
    shapes = {theirs: tuple(tensor.shape) for theirs, tensor in to_torchvision(model).items()}
    assert {theirs: shapes.get(theirs) for theirs in PUBLISHED[name]} == PUBLISHED[name]
    assert len(shapes) == len(model.state_dict())


def test_resnet_18_has_these_names_and_no_others():
    norm = {f"bn{i}.{kind}" for i in (1, 2) for kind in BATCH_NORM}
    block = norm | {"conv1.weight", "conv2.weight"}
    want = {"conv1.weight", "fc.weight", "fc.bias"} | {f"bn1.{kind}" for kind in BATCH_NORM}
    want |= {f"layer{stage}.{i}.{name}" for stage in (1, 2, 3, 4) for i in (0, 1) for name in block}
    for stage in (2, 3, 4):
        want |= {f"layer{stage}.0.downsample.{name}" for name in ("0.weight", *(f"1.{kind}" for kind in BATCH_NORM))}
    assert to_torchvision(model_of("resnet-18", width=4)).keys() == want


@pytest.mark.parametrize("depth", [18, 50])
def test_transformers_resnet_gives_the_same_logits(tmp_path, depth):
    """Its weights through torchvision's names into ours."""
    transformers = pytest.importorskip("transformers")
    times, depths = (4, [3, 4, 6, 3]) if depth == 50 else (1, [2, 2, 2, 2])
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4 * times << i for i in range(4)], depths=depths, num_labels=5,
        layer_type="bottleneck" if depth == 50 else "basic",
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.ResNetForImageClassification(config).eval()
    tensors = {}
    for name, tensor in theirs.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.is_floating_point():
            tensor.add_(torch.randn_like(tensor) * 0.1)
        *place, kind, last = name.removeprefix("resnet.").split(".")
        conv, norm = ("0", "1") if "shortcut" in place else ("conv", "bn")
        kind = conv if kind == "convolution" else norm
        match place:
            case ["embedder", "embedder"]:
                tensors[f"{kind}1.{last}"] = tensor
            case ["encoder", "stages", stage, "layers", i, "layer", j]:
                tensors[f"layer{int(stage) + 1}.{i}.{kind}{int(j) + 1}.{last}"] = tensor
            case ["encoder", "stages", stage, "layers", i, "shortcut"]:
                tensors[f"layer{int(stage) + 1}.{i}.downsample.{kind}.{last}"] = tensor
            case ["classifier"]:
                tensors[f"fc.{last}"] = tensor
    model = image_model(f"resnet-{depth}", 5, 65, width=4).eval()
    model.load_state_dict(from_torchvision(model, saved(tmp_path / "weights.pth", tensors)))
    images = torch.randn(2, 3, 65, 65, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = theirs(images).logits
        torch.testing.assert_close(model(images), want)
    assert want.std() > 0.1


@pytest.mark.parametrize("name", ["alexnet-owt", "vgg11", "googlenet-bn", "resnet-34"])
def test_out_and_back_is_the_same_bits(tmp_path, name):
    model = model_of(name, side=79)
    write_huggingface(tmp_path / "out", *to_timm(model, name))
    back = from_torchvision(model, tmp_path / "out")
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[k], v) for k, v in model.state_dict().items())


def test_timms_vgg_keeps_linear_layers_as_convolutions(tmp_path):
    model = model_of("vgg11", side=64)
    tensors = to_torchvision(model)
    for torchvisions, timms, shape in (
        ("classifier.0", "pre_logits.fc1", (4096, 512, 2, 2)),
        ("classifier.3", "pre_logits.fc2", (4096, 4096, 1, 1)),
        ("classifier.6", "head.fc", (5, 4096)),
    ):
        tensors[f"{timms}.weight"] = tensors.pop(f"{torchvisions}.weight").view(shape)
        tensors[f"{timms}.bias"] = tensors.pop(f"{torchvisions}.bias")
    back = from_torchvision(model, saved(tmp_path / "vgg11.pth", tensors))
    assert all(torch.equal(back[k], v) for k, v in model.state_dict().items())


def test_older_files_count_no_batches_and_googlenets_have_no_heads(tmp_path):
    model = model_of("googlenet-bn", side=79)
    tensors = {k: v for k, v in to_torchvision(model).items() if "num_batches" not in k and not k.startswith("aux")}
    back = from_torchvision(model, saved(tmp_path / "old.pth", tensors))
    assert {k for k in model.state_dict() if k not in back} == {k for k in model.state_dict() if k.startswith("heads.")}
    assert back["stem.0.norm.num_batches_tracked"] == 0


def test_weights_for_a_run_have_its_prefix(tmp_path):
    path = saved(tmp_path / "weights.pth", to_torchvision(model_of("resnet-18", classes=5, side=32)))
    found = weights_for("resnet-18", 5, 32, path, prefix="model.")
    assert found.keys() == {f"model.{name}" for name in model_of("resnet-18", side=32).state_dict()}


def test_another_network_is_refused(tmp_path):
    model = model_of("resnet-18", width=4)
    tensors = to_torchvision(model)
    path = saved(tmp_path / "weights.pth", tensors)
    with pytest.raises(UserError, match=r"weights\.pth: fc\.weight is \(5, 32\), but the model asks for \(6, 32\)"):
        from_torchvision(model_of("resnet-18", classes=6, width=4), path)
    with pytest.raises(UserError, match=r"layer1\.2\.conv1\.weight is missing"):
        from_torchvision(model_of("resnet-34", width=4), path)
    with pytest.raises(UserError, match="holds another network: it has extra"):
        from_torchvision(model, saved(tmp_path / "more.pth", tensors | {"extra": torch.zeros(1)}))
    with pytest.raises(UserError, match=r"none\.pth is missing"):
        from_torchvision(model, tmp_path / "none.pth")
    (tmp_path / "torn.pth").write_bytes(path.read_bytes()[:-500])
    with pytest.raises(UserError, match=r"torn\.pth is damaged"):
        from_torchvision(model, tmp_path / "torn.pth")
    for name in ("resnet-20", "plain-18", "googlenet", "inception-bn", "alexnet", "lenet"):
        with torch.device("meta"), pytest.raises(UserError, match="torchvision has only"):
            to_torchvision(image_model(name, 10, 32 if name in ("resnet-20", "lenet") else 79))
