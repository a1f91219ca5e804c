"""Thirty questions of three readers, with the section of the guide that answers each."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
STUDENT, ENGINEER, RESEARCHER = "student", "engineer", "researcher"

# Who asks, the question, page#section, and what an answer can't do without.
QUESTIONS = [
    (
        STUDENT,
        "What is the gradient norm?",
        "guide/what-it-is.md#a-number-and-a-vector",
        ["length", "Pythagoras"],
    ),
    (
        STUDENT,
        "What is the norm of a whole model?",
        "guide/what-it-is.md#a-whole-model",
        ["squares add up", "15.0"],
    ),
    (
        STUDENT,
        "Frobenius or spectral: which is it?",
        "guide/what-it-is.md#a-matrix",
        ["Frobenius", "singular values", "stable rank"],
    ),
    (
        STUDENT,
        "Why do gradients vanish?",
        "guide/what-it-tells.md#why-gradients-vanish-and-explode",
        ["multiplies", "below 1 vanish"],
    ),
    (
        STUDENT,
        "Does a vanishing gradient give a norm of zero?",
        "guide/what-it-tells.md#in-a-recurrent-network",
        ["**not**", "by layer"],
    ),
    (
        STUDENT,
        "Should the norm fall as the loss falls?",
        "guide/what-it-tells.md#a-healthy-curve",
        ["doesn't fall with the loss", "its own minimum"],
    ),
    (
        STUDENT,
        "What is clipping, as a picture?",
        "guide/clipping.md#the-geometry",
        ["keep their direction", "corners"],
    ),
    (
        STUDENT,
        "Do TensorFlow, JAX and torch agree?",
        "guide/what-it-is.md#the-same-in-five-libraries",
        ["1e-6", "optax", "clip_by_global_norm"],
    ),
    (
        STUDENT,
        "Which batch size is large enough?",
        "guide/noise-scale.md#signal-and-noise",
        ["half of the squared norm is noise", "doubling"],
    ),
    (
        STUDENT,
        "Why is my fp16 norm inf?",
        "guide/precision.md#range-squares-need-twice-the-exponent",
        ["65504", "256"],
    ),
    (
        ENGINEER,
        "The norm jumped by 1.41 after a restart",
        "guide/stories.md#the-norm-jumped-by-141-when-we-resumed",
        ["two replicas", "ratio"],
    ),
    (
        ENGINEER,
        "FSDP: each rank reports another norm",
        "gradient-norm.md#fsdp-and-zero-sharded-data-parallel",
        ["different part", "summed over the shard axis"],
    ),
    (
        ENGINEER,
        "HSDP: is sqrt(2) too high normal?",
        "gradient-norm.md#hsdp-sharded-within-replicated-across",
        ["sqrt(`dp_replicate`) high"],
    ),
    (
        ENGINEER,
        "A ratio of 1.28 that drifts",
        "guide/stories.md#it-is-28-too-high-but-only-with-tensor-parallelism",
        ["LayerNorms", "share of the gradient"],
    ),
    (
        ENGINEER,
        "Which mistake leaves which ratio?",
        "gradient-norm.md#5-reading-a-wrong-number",
        ["sqrt(R)", "1/R", "loss scale"],
    ),
    (
        ENGINEER,
        "grad_norm is 0.0 and the loss falls",
        "guide/stories.md#the-norm-is-zero",
        ["main_grad", "generator"],
    ),
    (
        ENGINEER,
        "grad_norm is always exactly 1.0",
        "guide/stories.md#the-norm-is-always-10",
        ["after clipping"],
    ),
    (
        ENGINEER,
        "One spike, back at once: data or hardware?",
        "guide/spikes.md#telling-them-apart",
        ["again with the same batch", "one differs"],
    ),
    (
        ENGINEER,
        "It hangs with frozen layers",
        "guide/stories.md#the-run-hangs-in-the-first-step-with-frozen-layers",
        ["never joined the collective"],
    ),
    (ENGINEER, "When do I unscale?", "guide/precision.md#loss-scales", ["Unscale, then measure, then clip"]),
    (
        ENGINEER,
        "What reduction order for five axes?",
        "guide/mesh.md#what-each-axis-does",
        ["first add up summands", "then the root"],
    ),
    (
        ENGINEER,
        "Why does it grow at the end of training?",
        "guide/scaling.md#the-end-of-training",
        ["weight decay", "Defazio"],
    ),
    (
        RESEARCHER,
        "Does clipping matter under Adam?",
        "guide/clipping.md#under-an-optimizer",
        ["protects the second moment", "bounds the step without clipping"],
    ),
    (
        RESEARCHER,
        "Which clipping methods are there?",
        "guide/clipping.md#the-kinds",
        ["AutoClip", "ZClip", "AdaGC", "AGGC", "spectral", "AGC"],
    ),
    (
        RESEARCHER,
        "Why would clipping be faster, not only safer?",
        "guide/clipping.md#why-it-may-be-faster",
        ["L_1", "heavy tails", "bias"],
    ),
    (
        RESEARCHER,
        "How sensitive is the threshold?",
        "guide/threshold.md#what-a-wrong-one-costs",
        ["SGD has a valley", "exactly the same"],
    ),
    (
        RESEARCHER,
        "When do adaptive thresholds fail?",
        "guide/threshold.md#let-it-follow",
        ["slow growth", "every step is skipped"],
    ),
    (
        RESEARCHER,
        "Does a threshold carry over to another width?",
        "guide/scaling.md#width",
        ["muP", "standard parametrization"],
    ),
    (
        RESEARCHER,
        "How does clipping act on experts?",
        "guide/moe.md#what-that-does-to-clipping",
        ["decided by the dense part", "Groups"],
    ),
    (
        RESEARCHER,
        "What does a norm near zero mean in RL?",
        "guide/rl.md#a-run",
        ["no vanishing gradient", "nothing to compare"],
    ),
]


def sections(page: str) -> dict[str, str]:
    """Each heading's anchor, as GitHub and the site make it, with all that stands under the heading."""
    text = (DOCS / page).read_text(encoding="utf-8")
    text = re.sub(
        r"^```.*?^```$", lambda block: block[0].replace("\n#", "\n "), text, flags=re.MULTILINE | re.DOTALL
    )
    heads = list(re.finditer(r"^(#+) (.+)$", text, re.MULTILINE))
    found = {}
    for i, head in enumerate(heads):
        ends = (later.start() for later in heads[i + 1 :] if len(later[1]) <= len(head[1]))
        anchor = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", head[2]).strip().lower())
        found[anchor] = text[head.start() : next(ends, len(text))]
    return found


@pytest.mark.parametrize(("reader", "question", "place", "phrases"), QUESTIONS, ids=[q[1] for q in QUESTIONS])
def test_a_section_answers(reader: str, question: str, place: str, phrases: list[str]) -> None:
    page, anchor = place.split("#")
    there = sections(page)
    assert anchor in there, sorted(there)
    answer = " ".join(there[anchor].split())
    assert [phrase for phrase in phrases if phrase.lower() not in answer.lower()] == []


def test_there_are_thirty_of_three_readers() -> None:
    assert len({question for _, question, _, _ in QUESTIONS}) == 30
    assert {
        reader: sum(q[0] == reader for q in QUESTIONS) >= 8 for reader in (STUDENT, ENGINEER, RESEARCHER)
    } == {
        STUDENT: True,
        ENGINEER: True,
        RESEARCHER: True,
    }
