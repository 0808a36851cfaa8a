"""Hugging Face's Trainer, and transformers' own models, for comparison. The only importer of transformers."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dltrain.models.bert import BertConfig
from dltrain.models.gpt import GptConfig

if TYPE_CHECKING:
    from dltrain.throughput.turns import Player

# B rows, L tokens of a row, P predicted positions of a row


def transformers() -> Any:
    """The module, quiet about what is unusual in a comparison."""
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers


class Gpt2(nn.Module):
    """transformers' GPT-2 of the same size."""

    def __init__(self, cfg: GptConfig):
        super().__init__()
        config = transformers().GPT2Config(
            vocab_size=cfg.vocab, n_positions=cfg.positions, n_embd=cfg.width, n_layer=cfg.layers, n_head=cfg.heads,
            resid_pdrop=cfg.dropout, embd_pdrop=cfg.dropout, attn_pdrop=cfg.dropout, use_cache=False,
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        config._attn_implementation = "sdpa"
        self.model = transformers().GPT2LMHeadModel(config)

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        return {"loss": self.model(input_ids=batch["ids_BL"], labels=batch["ids_BL"]).loss}


class Bert(nn.Module):
    """transformers' BERT of the same size, which multiplies all positions with the vocabulary."""

    def __init__(self, cfg: BertConfig):
        super().__init__()
        config = transformers().BertConfig(
            vocab_size=cfg.vocab, hidden_size=cfg.width, num_hidden_layers=cfg.layers, num_attention_heads=cfg.heads,
            intermediate_size=cfg.mlp, max_position_embeddings=cfg.positions, hidden_dropout_prob=cfg.dropout,
            attention_probs_dropout_prob=cfg.dropout,
        )  # fmt: skip
        config._attn_implementation = "sdpa"
        self.model = transformers().BertForPreTraining(config)

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        ids_BL = batch["ids_BL"]
        labels_BL = torch.full_like(ids_BL, -100).scatter(1, batch["positions_BP"], batch["targets_BP"])
        found = self.model(
            input_ids=ids_BL, token_type_ids=batch["segments_BL"], labels=labels_BL,
            next_sentence_label=batch["next_B"],
        )  # fmt: skip
        return {"loss": found.loss}


def drive_trainer(
    player: "Player",
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader,
    *,
    micros: int,
    clip: float,
    precision: str,
    folder: str,
) -> None:
    """`Trainer.train` without end; logs and saves nothing. `micros` micro-batches of the loader make a step."""
    library = transformers()

    class Turns(library.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if state.global_step != self.step:  # called once a step, whatever the number of micro-batches
                self.step = state.global_step
                player.boundary()

        step = -1

    class Trainer(library.Trainer):
        def get_train_dataloader(self) -> DataLoader:
            return loader

    device = next(module.parameters()).device
    arguments = library.TrainingArguments(
        output_dir=folder, max_steps=1 << 30, per_device_train_batch_size=1, gradient_accumulation_steps=micros,
        max_grad_norm=clip, bf16=precision == "bf16", lr_scheduler_type="constant", logging_strategy="no",
        save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=device.type == "cpu", seed=0,
        logging_nan_inf_filter=False,  # or every step waits for the GPU
    )  # fmt: skip
    arguments._n_gpu = min(arguments.n_gpu, 1)  # no DataParallel
    trainer = Trainer(module, arguments, optimizers=(optimizer, None), callbacks=[Turns()])  # type: ignore[arg-type]
    trainer.remove_callback(library.PrinterCallback)
    player.module, player.optimizer = module, optimizer
    trainer.train()
