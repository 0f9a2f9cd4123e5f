"""Hugging Face's Trainer with --deepspeed, as anyone writes it: nothing in it knows of hpc_ds, of Slurm, or of preemption.

A small GPT-2, made from its config, learns the text of this Python's standard library, byte by byte.
"""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, Trainer, TrainingArguments, set_seed

VOCABULARY = 256  # bytes


@dataclass
class ModelArguments:
    """The size of the model and of its data."""

    width: int = field(default=64)
    layers: int = field(default=2)
    context: int = field(default=64)
    samples: int = field(default=2000)


class Bytes(torch.utils.data.Dataset):
    """Pieces of text of one length, whose labels are themselves."""

    def __init__(self, context: int, samples: int) -> None:
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        text = b"".join(path.read_bytes() for path in files)[: context * samples]
        self._pieces = torch.tensor(bytearray(text), dtype=torch.long)[: len(text) // context * context].view(
            -1, context
        )

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._pieces[index], "labels": self._pieces[index]}


def main() -> None:
    asked, arguments = HfArgumentParser((ModelArguments, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(arguments.seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=asked.context,
        n_embd=asked.width,
        n_layer=asked.layers,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    trainer = Trainer(
        model=GPT2LMHeadModel(config),
        args=arguments,
        train_dataset=Bytes(asked.context, asked.samples),
        eval_dataset=Bytes(asked.context, 64),
    )
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_metrics("eval", trainer.evaluate())


if __name__ == "__main__":
    main()
