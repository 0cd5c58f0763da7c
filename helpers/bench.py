"""Measurements of this machine, each table from one run, so that its rows can be compared."""

from __future__ import annotations

import time
from collections.abc import Callable

import pandas as pd
import torch

from helpers.recipe import get
from helpers.runtime import pick_device


def _rate(call: Callable[[], object], images: int, seconds: float = 6.0) -> float:
    """Images per second of a call, repeated for a while after one warm-up call."""
    call()
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        count += images
    return count / elapsed


def train_table(batch_size: int = 64) -> pd.DataFrame:
    """Images/s of one training step of the paper's network on random images, by memory format and arithmetic."""
    device, rows = pick_device(), []
    images = torch.randn(batch_size, 3, 32, 32, device=device)
    labels = torch.randint(10, (batch_size,), device=device)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        for precision in (torch.float32, torch.bfloat16):
            model = get("paper").network().to(device, memory_format=memory_format)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

            def step(model=model, optimizer=optimizer, precision=precision, memory_format=memory_format):
                with torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
                    logits = model(images.contiguous(memory_format=memory_format))
                torch.nn.functional.cross_entropy(logits.float(), labels).backward()
                optimizer.step()
                optimizer.zero_grad()

            rows.append({
                "memory format": str(memory_format).removeprefix("torch."),
                "precision": str(precision).removeprefix("torch."), "images/s": round(_rate(step, batch_size), 1),
            })  # fmt: skip
    table = pd.DataFrame(rows)
    table["ratio"] = (table["images/s"] / table["images/s"].iloc[0]).round(2)
    return table


SUBJECTS = {"train": train_table}
