"""The code of docs/cuda-graphs.md is run, with a recording in place of the graph: it needs no GPU here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

import distnorm
from tests.counting import as_on_an_accelerator
from tests.recording import Recording, recorded

TEXT = (Path(__file__).parent.parent / "docs" / "cuda-graphs.md").read_text(encoding="utf-8")


class Graph:
    recording: Recording

    def replay(self) -> None:
        self.recording.replay()


@contextmanager
def capture(graph: Graph) -> Iterator[None]:
    with recorded() as graph.recording:
        yield


def test_the_example_replays_each_batch() -> None:
    inputs, weight = torch.ones(4), torch.nn.Parameter(torch.full((4,), 2.0))
    weight.grad = torch.zeros(4)
    batches = [torch.full((4,), float(i)) for i in (1, 3, 5)]
    with as_on_an_accelerator():
        clipper = distnorm.GradClipper([("weight", weight)], {"clip": {"max_norm": 1.0}})

        def train_step() -> Tensor:
            assert weight.grad is not None
            weight.grad.copy_(inputs * 2)  # what a backward pass would leave
            loss = (weight.detach() * inputs).sum()
            clipper.note(loss=loss)
            clipper.clip()
            return loss

        names = {
            "torch": torch,
            "train_step": train_step,
            "clipper": clipper,
            "inputs": inputs,
            "batches": batches,
        }
        (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
        with mock.patch.multiple(torch.cuda, CUDAGraph=Graph, graph=capture):
            exec(code, names)
    assert float(names["loss"]) == 4 * 2 * 5  # of the last batch, in the memory of the captured step
    assert float(names["result"].total_norm) == 2 * 2 * 5
    torch.testing.assert_close(weight.grad, torch.full((4,), 0.5))
