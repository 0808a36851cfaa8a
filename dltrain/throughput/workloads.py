"""What is trained: our models and the same ones by others, on made-up rows.

All take one batch, that of our rows. Ours give a sum, to be divided by batch["count"]; the others a mean. Text is of
random tokens, images of random pixels, which cost what real ones do once they are read and decoded.
"""

# B rows, L tokens of a row, P predicted positions of a row; M rows of a micro-batch, N made-up rows

import importlib.util
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dltrain import ops
from dltrain.data.loader import Rows
from dltrain.data.order import Order
from dltrain.data.windows import Windows
from dltrain.models.bert import BertConfig, BertPretraining
from dltrain.models.gpt import Gpt, GptConfig
from dltrain.models.image import image_model
from dltrain.optim import Builder, adamw, sgd
from dltrain.throughput import hugging_face
from dltrain.throughput.plain_gpt import PlainGpt

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One model with its batch. A step is `batch` rows, in micro-batches of `micro`; a turn is `turn` steps.

    `usual` is the optimizer with torch's own fused update, which all but ours use. `plain` are others' models for a
    bare loop and `hugging_face` transformers' own model, by what they are called; each gives a mean loss.
    """

    what: str
    task: Callable[[], nn.Module]
    rows: Callable[[], Rows]
    optimizer: Builder
    usual: Callable[[nn.Module], torch.optim.Optimizer]
    batch: int
    micro: int
    turn: int
    unit: str  # of throughput
    per_row: int  # units of a row
    precision: Any = "fp32"
    compile: bool = False
    plain: Mapping[str, Callable[[], nn.Module]] = field(default_factory=dict)
    hugging_face: Mapping[str, Callable[[], nn.Module]] = field(default_factory=dict)
    least: float = 0.0  # units a second on an H200: the goal
    times: Mapping[str, float] = field(default_factory=dict)  # goal: how many times as fast as another side


# --- rows ----------------------------------------------------------------------------------------------------------


def text(vocab: int, row: int) -> Windows:
    tokens = np.random.Generator(np.random.Philox(key=0)).integers(0, vocab, 1 << 20)
    return Windows(tokens, row, 1, "random tokens")


class Made:
    """Rows that lie ready in memory: row i is entry i mod N of each array, whatever the epoch."""

    def __init__(self, arrays: dict[str, np.ndarray], counted: int):
        self.arrays, self.counted, self.fingerprint = arrays, counted, f"made up, {sorted(arrays)}"

    def __len__(self) -> int:
        return 1 << 20

    def batch(self, epoch_M: np.ndarray, index_M: np.ndarray, /) -> dict[str, Any]:
        found = {k: torch.from_numpy(a[index_M % len(a)]) for k, a in self.arrays.items()}
        return found | {"count": torch.tensor(len(index_M) * self.counted)}


def masked_text(vocab: int, row: int) -> Made:
    """Full rows in two halves, of which 15 % are to be predicted."""
    random, n, predicted = np.random.Generator(np.random.Philox(key=0)), 512, max(1, round(0.15 * row))
    positions = np.sort(np.argsort(random.random((n, row)), 1)[:, :predicted], 1)
    arrays = {
        "ids_BL": random.integers(0, vocab, (n, row)),
        "segments_BL": np.broadcast_to(np.arange(row) >= row // 2, (n, row)).astype(np.int64),
        "lengths_B": np.full(n, row),
        "next_B": random.integers(0, 2, n),
        "positions_BP": positions,
        "targets_BP": random.integers(0, vocab, (n, predicted)),
    }
    return Made(arrays, predicted)


def images(side: int, classes: int) -> Made:
    random = np.random.Generator(np.random.Philox(key=0))
    pixels = random.integers(0, 256, (512, 3, side, side), dtype=np.uint8)
    return Made({"images_BCHW": pixels, "labels_B": random.integers(0, classes, 512)}, 1)


class _Micros(Dataset):
    """Position of the first row -> micro-batch."""

    def __init__(self, rows: Rows, micro: int):
        self.rows, self.micro, self.order = rows, micro, Order(len(rows), 0)

    def __len__(self) -> int:
        return 1 << 40

    def __getitem__(self, start: int) -> Batch:
        return self.rows.batch(*self.order.at(np.arange(start, start + self.micro)))


def batches(rows: Rows, micro: int, pin: bool) -> DataLoader:
    """The micro-batches of a shuffle without end, as torch's own loader gives them."""
    starts: Any = itertools.count(0, micro)
    return DataLoader(_Micros(rows, micro), batch_size=None, sampler=starts, pin_memory=pin)


# --- ours: batch -> {"loss": sum} ----------------------------------------------------------------------------------


class GptTask(nn.Module):
    def __init__(self, cfg: GptConfig):
        super().__init__()
        self.model = Gpt(cfg)

    def forward(self, batch: Batch) -> Batch:
        return {"loss": self.model.loss(batch["ids_BL"], batch["targets_BL"])}


class BertTask(nn.Module):
    def __init__(self, cfg: BertConfig):
        super().__init__()
        self.model = BertPretraining(cfg)

    def forward(self, batch: Batch) -> Batch:
        logits_BPV, next_B2 = self.model(*(batch[k] for k in ("ids_BL", "segments_BL", "lengths_B", "positions_BP")))
        masked = ops.cross_entropy(logits_BPV.flatten(0, 1), batch["targets_BP"].flatten(), reduction="sum")
        assert next_B2 is not None
        following = ops.cross_entropy(next_B2, batch["next_B"], reduction="sum")
        return {"loss": masked + following * batch["targets_BP"].shape[1]}


class ImageTask(nn.Module):
    def __init__(self, name: str, classes: int, side: int):
        super().__init__()
        self.model = image_model(name, classes, side)

    def forward(self, batch: Batch) -> Batch:
        dtype = next(self.model.parameters()).dtype  # bfloat16 where the trainer casts
        logits_BK = self.model(scaled(batch["images_BCHW"]).to(dtype))
        return {"loss": F.cross_entropy(logits_BK.float(), batch["labels_B"], reduction="sum")}


def scaled(images_BCHW: Tensor) -> Tensor:
    return (images_BCHW.float() - 127.5) / 64.0


# --- others': **batch -> {"loss": mean} ----------------------------------------------------------------------------


class Mean(nn.Module):
    """Our task as others call theirs."""

    def __init__(self, task: nn.Module):
        super().__init__()
        self.model = task

    def forward(self, **batch: Tensor) -> Batch:
        return {"loss": self.model(batch)["loss"] / batch["count"]}


class TextModel(nn.Module):
    """Of a model from ids and targets to the mean loss."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **batch: Tensor) -> Batch:
        return {"loss": self.model(batch["ids_BL"], batch["targets_BL"])}


class ImageModel(nn.Module):
    """Of a model from images, channels last, to logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, **batch: Tensor) -> Batch:
        images_BCHW = scaled(batch["images_BCHW"]).contiguous(memory_format=torch.channels_last)
        return {"loss": F.cross_entropy(self.model(images_BCHW), batch["labels_B"])}


def timm_model(name: str, classes: int) -> nn.Module:
    import timm  # type: ignore[import-not-found]  # an option

    return ImageModel(timm.create_model(name, num_classes=classes))


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


# --- sizes ---------------------------------------------------------------------------------------------------------


def usual_adamw(module: nn.Module) -> torch.optim.Optimizer:
    parameters = list(module.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, 3e-4, (0.9, 0.95), 1e-8, fused=True)


def usual_sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), 0.05, 0.9, weight_decay=5e-5, fused=True)


def gpt(cfg: GptConfig, what: str, plain: bool = True, theirs: bool = True, **more: Any) -> Workload:
    return Workload(
        what=what, task=partial(GptTask, cfg), rows=partial(text, cfg.vocab, cfg.positions),
        optimizer=adamw(3e-4, (0.9, 0.95), 1e-8, 0.1), usual=usual_adamw, unit="tokens", per_row=cfg.positions,
        plain={"plain loop, torch's layers": lambda: TextModel(PlainGpt(cfg))} if plain else {},
        hugging_face={"Trainer, transformers' model": partial(hugging_face.Gpt2, cfg)} if theirs else {}, **more,
    )  # fmt: skip


def bert(cfg: BertConfig, row: int, what: str, **more: Any) -> Workload:
    return Workload(
        what=what, task=partial(BertTask, cfg), rows=partial(masked_text, cfg.vocab, row),
        optimizer=adamw(3e-4, (0.9, 0.95), 1e-8, 0.1), usual=usual_adamw, unit="tokens", per_row=row,
        hugging_face={"Trainer, transformers' model": partial(hugging_face.Bert, cfg)}, **more,
    )  # fmt: skip


def resnet(name: str, side: int, classes: int, what: str, timm: str = "", **more: Any) -> Workload:
    there = timm and installed("timm")
    return Workload(
        what=what, task=partial(ImageTask, name, classes, side), rows=partial(images, side, classes),
        optimizer=sgd(0.05, 0.9, 5e-5), usual=usual_sgd, unit="images", per_row=1,
        plain={"plain loop, timm's model": partial(timm_model, timm, classes)} if there else {}, **more,
    )  # fmt: skip


GPU: dict[str, Any] = {"precision": "bf16", "compile": True}
SIZES: dict[str, Callable[[], Workload]] = {
    # of a CPU
    "gpt-tiny": lambda: gpt(
        GptConfig(vocab=512, layers=4, width=128, heads=4, positions=64, dropout=0.0),
        "4 layers of 128, vocabulary of 512, 12 rows of 64 tokens", batch=12, micro=12, turn=6,
    ),
    "bert-tiny": lambda: bert(
        BertConfig(vocab=4096, layers=2, width=128, heads=2, mlp=512), 64,
        "2 layers of 128, vocabulary of 4,096, 16 rows of 64 tokens", batch=16, micro=16, turn=6,
    ),
    "resnet-20": lambda: resnet("resnet-20", 32, 10, "16 images of 32 pixels", batch=16, micro=16, turn=4),
    "gpt-10m": lambda: gpt(
        GptConfig(vocab=512, layers=6, width=384, heads=6, positions=64, dropout=0.0),
        "11M parameters, 4 rows of 64 tokens", batch=4, micro=4, turn=4,
    ),
    # of a GPU
    "gpt2": lambda: gpt(
        GptConfig(vocab=50304, dropout=0.0), "124M parameters, 128 rows of 1,024 tokens", batch=128, micro=32, turn=8,
        least=560_000, times={"plain loop, torch's layers": 1.25}, **GPU,
    ),
    "gpt-1.3b": lambda: gpt(
        GptConfig(vocab=50304, layers=24, width=2048, heads=16, positions=2048, dropout=0.0),
        "1.3B parameters, 16 rows of 2,048 tokens", plain=False, theirs=False, batch=16, micro=8, turn=4,
        least=50_000, **GPU,
    ),
    "bert-base": lambda: bert(
        BertConfig(), 512, "110M parameters, 128 rows of 512 tokens", batch=128, micro=64, turn=8, **GPU
    ),
    "bert-large": lambda: bert(
        BertConfig(layers=24, width=1024, heads=16, mlp=4096), 512, "336M parameters, 64 rows of 512 tokens",
        batch=64, micro=32, turn=6, times={"Trainer, transformers' model": 1.3}, **GPU,
    ),
    "resnet-50": lambda: resnet(
        "resnet-50", 224, 1000, "256 images of 224 pixels", timm="resnet50", batch=256, micro=256, turn=10,
        least=3300, **GPU,
    ),
}  # fmt: skip
ON_CPU, ON_GPU = ("gpt-tiny", "bert-tiny", "resnet-20"), ("gpt2", "gpt-1.3b", "bert-base", "bert-large", "resnet-50")
SAVED = {"cpu": "gpt-10m", "cuda": "gpt-1.3b"}  # whose checkpoint is measured


def pulled(loader: DataLoader, device: torch.device) -> Iterator[Batch]:
    """Its micro-batches, on the device."""
    for batch in loader:
        yield {k: v.to(device, non_blocking=True) for k, v in batch.items()}
