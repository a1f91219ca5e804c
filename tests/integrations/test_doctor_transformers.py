"""transformers' native tensor parallelism with accumulation, under the doctor's eyes."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

import distnorm
from distnorm import DoctorReport
from distnorm.testing import preload
from distnorm.verification.doctor.mistakes import Mistake
from tests.integrations import hf

preload("distnorm.verification.doctor", "transformers.models.qwen3.modeling_qwen3")

NORMS = ("q_norm", "k_norm")


def reports(saved: str) -> list[DoctorReport]:
    """With one micro-batch a step, and with two."""
    return [micro_batches(saved, count) for count in (1, 2)]


def micro_batches(saved: str, count: int) -> DoctorReport:
    """A Qwen3 whose heads are cut over 2 ranks, and share the weights of two norms."""
    import torch
    from transformers import Qwen3ForCausalLM
    from transformers.distributed import DistributedConfig

    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    sizes = DistributedConfig(tp_size=2)
    model = Qwen3ForCausalLM.from_pretrained(saved, distributed_config=sizes, dtype=torch.float32)
    whole = Qwen3ForCausalLM.from_pretrained(saved, dtype=torch.float32)
    rows = torch.randint(hf.VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(1))

    def loss(model: nn.Module, some: Tensor) -> Tensor:
        logits = model(input_ids=some[:, :-1]).logits
        return F.cross_entropy(logits.flatten(0, 1), some[:, 1:].flatten())

    def reference(part: int = 0, parts: int = 1) -> nn.Module:
        (loss(whole, rows.chunk(parts)[part]) / parts).backward()
        return whole

    with distnorm.doctor(
        model, reference=reference, mesh=mesh, parts=count, microbatches=count
    ) as examination:
        for some in rows.chunk(count):
            (loss(model, some) / count).backward()
    assert examination.report is not None and dist.get_world_size() == 2
    return examination.report


def test_a_norm_that_heads_share_is_reduced_again_in_each_micro_batch(ranks, tmp_path) -> None:
    """transformers 5.24 does so. A later version that doesn't leaves nothing to find, and fails here."""
    hf.qwen().save_pretrained(tmp_path)
    one, two = ranks(2, reports, str(tmp_path))[0]
    assert one.ok
    wrong = {verdict.name.rpartition(".")[0].rpartition(".")[2] for verdict in two.wrong}
    assert wrong == set(NORMS)
    for verdict in two.wrong:
        (found,) = verdict.explanations
        assert (found.mistake, found.axes) == (Mistake.REDUCED_AGAIN, ("tp",)), found
    assert two.cause is not None and "reduced again in each micro-batch" in str(two)
