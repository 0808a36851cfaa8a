"""What gate.py compiles: see there. Defaults by their options, then the candidates that a GPU is to choose from."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dltrain.kernels import attention_backward_triton, attention_triton, launch

BERT = {"dropout_p": 0.1, "lengths": True}
ALL = {"dropout_p": 0.1, "lengths": True, "documents": True, "softcap": 30.0, "left": 128, "right": 0}
CASES = [  # features of a head, type, options; and fewer key heads
    (64, torch.bfloat16, {"right": 0}),
    (64, torch.float16, BERT),
    (128, torch.bfloat16, {"right": 0, "G": 2}),
    (80, torch.bfloat16, ALL),
    (256, torch.bfloat16, {"right": 0}),
    (256, torch.bfloat16, ALL),
    (128, torch.float32, {"right": 0}),
    (256, torch.float32, ALL),
]


def problem(head: int, dtype: torch.dtype, given: dict[str, Any]) -> tuple[Tensor, Tensor, attention_triton.Options]:
    def meta(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    B, L, H = 4, 2048, 8
    query, key = (meta(B, L, n, head, dtype=dtype).transpose(1, 2) for n in (H, given.get("G", H)))
    options = attention_triton.Options(
        seed=meta(1, dtype=torch.int64) if "dropout_p" in given else None,
        key_lengths=meta(B) if "lengths" in given else None,
        start=meta(B, L) if "documents" in given else None,
        end=meta(B, L) if "documents" in given else None,
        scale=head**-0.5,
        **{name: given.get(name, other) for name, other in (("softcap", 0.0), ("dropout_p", 0.0))},
        **{name: given.get(name, -1) for name in ("left", "right")},
    )
    return query, key, options


def run(head: int, dtype: torch.dtype, given: dict[str, Any]) -> None:
    query, key, options = problem(head, dtype, given)
    attention_triton.attention(query, key, key, options)
    lse = attention_triton.empty_rows(query)
    attention_backward_triton.gradients(query, query, key, key, query, lse, options)


def run_one(kernel: str, row: dict[str, Any]) -> None:
    """One kernel by the configuration of a row; the others do nothing."""
    modules = {"forward": attention_triton} | dict.fromkeys(
        ("delta", "query_gradient", "key_value_gradient"), attention_backward_triton
    )
    with contextlib.ExitStack() as stack:
        for other in modules.keys() - {kernel.removeprefix("attention_")}:
            stack.enter_context(mock.patch.object(modules[other], other, mock.MagicMock()))
        stack.enter_context(mock.patch.object(launch, "config", return_value=row["use"]))
        run(row["when"]["head"], torch.bfloat16, {"right": 0})


def launches() -> Iterator[tuple[str, Any]]:
    for head, dtype, given in CASES:
        yield f"{head} {dtype} {given}", lambda case=(head, dtype, given): run(*case)
    for name, rows in launch.table("sm90").items():
        if name.startswith("attention_") and name.endswith("_candidates"):
            for row in rows:
                kernel = name.removesuffix("_candidates")
                yield f"{kernel} {row}", lambda kernel=kernel, row=row: run_one(kernel, row)
