"""fp16 on a CPU, where accelerate makes no loss scaler because it is of no use there.

These trainers get torch's own for the CPU; everything after that (autocast, accelerate's backward and clipping, the
optimizers' own ways to skip) is what runs on a GPU.
"""

import torch
from transformers import Trainer


class OnCPU(Trainer):
    """Trains in fp16, with a loss scale that an overflow takes to 2^16."""

    scale = 2.0**16

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        assert self.accelerator.mixed_precision == "fp16" and self.accelerator.scaler is None
        self.accelerator.native_amp = True
        self.accelerator.scaler = torch.amp.GradScaler(
            "cpu", init_scale=self.scale, backoff_factor=0.5 if self.scale == 2.0**16 else 2.0**16 / self.scale
        )


class PlainOverflowing(OnCPU):
    """Its first update overflows."""

    scale = 2.0**40
