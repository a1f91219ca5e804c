"""One step's forward and backward on this rank, the same gradient whatever the topology of torch's."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from distnorm import RunError
from distnorm.trainer.job import Job
from distnorm.trainer.model import TIED_NAMES, VOCABULARY, Transformer, mean_loss
from distnorm.trainer.topology import FSDP1_PREFIX, parallelize


class Engine:
    """The model on torch's own parallelisms. Every rank makes one, in the same call. Collective.

    Args:
        job: what is trained.
        model: the whole model, the same on every rank; what other ranks hold is taken out of it.

    Attributes:
        module: what this rank calls: its stage of the model, wrapped by DDP or FSDP1 under those backends.
        tied: the names on different stages that are one parameter, as `GradClipper` takes them.
    """

    def __init__(self, job: Job, model: Transformer) -> None:
        self.job, self.config, self.world, self.topology = job, job.config, job.world, job.topology
        train = self.config.train
        if self.pipelined:
            model.keep_stage(self.topology.index("pp"), self.topology.degree("pp"))
        model.to(device=self.world.device, dtype=getattr(torch, train.dtype))
        self.module: nn.Module = parallelize(model, self.topology)
        self._schedule = self._make_schedule() if self.pipelined else None
        # In one process a tied embedding is one parameter with one name; between stages it is two.
        self.tied = (TIED_NAMES,) if self.pipelined and train.model.tie_embeddings else ()
        self._ends = self.topology.end_stages_group() if self.tied else None

    @property
    def pipelined(self) -> bool:
        return self.topology.degree("pp") > 1

    @property
    def microbatches(self) -> int:
        """How many micro-batches a pipeline cuts this rank's slice of the batch into."""
        return self.config.train.parallel.microbatches or 2 * self.topology.degree("pp")

    @property
    def stage(self) -> Transformer:
        """This rank's part of the model, without its wrapper."""
        wrappers = (DistributedDataParallel, FullyShardedDataParallel)
        module = self.module.module if isinstance(self.module, wrappers) else self.module
        assert isinstance(module, Transformer)
        return module

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """This rank's parameters by their names in the whole model, a tied one by its first name."""
        canonical = {name: names[0] for names in self.tied for name in names}
        named = ((name.replace(FSDP1_PREFIX, ""), p) for name, p in self.stage.named_parameters())
        return {canonical.get(name, name): p for name, p in named}

    def backward(self, step: int) -> Tensor:
        """Compute the gradient of the loss over step `step`'s global batch. Collective.

        Returns:
            This rank's share of that loss, 0-d fp64: summed over all ranks it is the mean over all tokens.
        """
        inputs, targets = self.job.batch(step)
        if self._schedule is not None:
            losses = self._run_schedule(self._schedule, inputs, targets)
        else:
            losses = [mean_loss(self.module(inputs), targets)]
            losses[0].backward()  # type: ignore[no-untyped-call]
        parameters = self.named_parameters()
        _shard_gradients(parameters.values())
        if self._ends is not None:
            # Both ends get the gradient of the one embedding that their two weights stand for.
            dist.all_reduce(_local_gradient(parameters[TIED_NAMES[0]]), group=self._ends)
        share = torch.zeros((), dtype=torch.float64, device=self.world.device)
        if self._has_loss:
            share += (
                torch.stack([loss.detach().double() for loss in losses]).mean() / self.topology.data_degree
            )
        return share

    @property
    def _has_loss(self) -> bool:
        """Tensor parallel ranks all hold the same loss, of which one counts; other stages hold none."""
        return self.topology.is_last_stage and self.topology.index("tp") == 0

    def loss_of(self, share: Tensor) -> Tensor | None:
        """From what `backward` returned to the mean loss of this rank's sequences, if it has it."""
        return share * self.topology.data_degree if self._has_loss else None

    def _run_schedule(self, schedule: Schedule1F1B, inputs: Tensor, targets: Tensor) -> list[Tensor]:
        losses: list[Tensor] = []
        arguments = (inputs,) if self.topology.index("pp") == 0 else ()
        if self.topology.is_last_stage:
            schedule.step(*arguments, target=targets, losses=losses, return_outputs=False)
        else:
            schedule.step(*arguments, return_outputs=False)
        return losses

    def _make_schedule(self) -> Schedule1F1B:
        """1F1B over this rank's stage; the shapes between stages are given, so nothing is traced."""
        train, topology = self.config.train, self.topology
        stages, stage = topology.degree("pp"), topology.index("pp")
        microbatches = self.microbatches
        rows = train.data.batch_size // topology.data_degree // microbatches
        context = train.model.context
        local_context = context // topology.degree("tp") if train.parallel.sequence_parallel else context
        options = {"dtype": getattr(torch, train.dtype), "device": "meta"}
        hidden = torch.empty(rows, local_context, train.model.dim, requires_grad=True, **options)
        tokens = torch.empty(rows, context, dtype=torch.int64, device="meta")
        logits = torch.empty(rows, context, VOCABULARY, requires_grad=True, **options)
        pipeline_stage = PipelineStage(
            self.module,
            stage,
            stages,
            self.world.device,
            input_args=(tokens if stage == 0 else hidden,),
            output_args=(logits if topology.is_last_stage else hidden,),
            group=topology.axis("pp").get_group(),
        )
        # scale_grads divides the sum over micro-batches by their number: each loss is a mean over its own.
        if "scale_grads" not in inspect.signature(Schedule1F1B).parameters:
            raise RunError(
                "train.parallel.pp: expected a torch whose pipelines divide by the number of micro-batches, "
                f"2.7 or newer, found {torch.__version__}"
            )
        return Schedule1F1B(pipeline_stage, microbatches, loss_fn=mean_loss, scale_grads=True)


def _shard_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Lay gradients out as their parameters where those are sharded.

    torch's embedding leaves a vocabulary-sharded weight with a whole or a partial gradient. The partial
    gradients of replicated parameters are left as they are: distnorm reduces those.
    """
    for parameter in parameters:
        gradient = parameter.grad
        if not isinstance(parameter, DTensor) or not isinstance(gradient, DTensor):
            continue
        pairs = zip(parameter.placements, gradient.placements, strict=True)
        if any(ours != theirs and not ours.is_replicate() for ours, theirs in pairs):
            aligned = gradient.redistribute(placements=parameter.placements)
            parameter.grad = None  # torch refuses to put a gradient of another layout in an old one's place
            parameter.grad = aligned


def _local_gradient(parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad
    assert gradient is not None
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
