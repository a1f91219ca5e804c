"""Views that have the memory of tensors once: scaled in place, every element is scaled once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from distnorm.kernels import SharedMemoryError, memory_of, once, scale_

HALF = torch.tensor(0.5, dtype=torch.float64)


def doubled(value: Tensor) -> Tensor:
    return value.clone().resolve_conj().resolve_neg() * 2


VIEWS = {
    "contiguous": torch.arange(6.0).view(2, 3),
    "transposed": torch.arange(6.0).view(2, 3).t(),
    "gaps": torch.arange(12.0).view(3, 4)[:, ::2],
    "expanded": torch.arange(3.0).expand(4, 3),
    "expanded within": torch.arange(6.0).view(2, 1, 3).expand(2, 5, 3),
    "expanded scalar": torch.tensor(3.0).expand(2, 2),
    "conjugated": torch.arange(4).to(torch.complex64).mul(1 + 2j).conj(),
    "negated": torch.arange(4).to(torch.complex64).mul(1 + 2j).conj().imag,
    "conjugated and expanded": torch.tensor(1 + 2j).conj().expand(3),
    "interleaved, none twice": torch.arange(8.0).as_strided((2, 3), (3, 2)),
    "empty": torch.zeros(0, 3),
    "expanded and empty": torch.zeros(1).expand(0),
    "one element, any stride": torch.arange(5.0).as_strided((1, 1), (0, 7)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_scaling_its_memory_scales_a_tensor_once(name):
    tensor = VIEWS[name]
    before = tensor.clone()
    memory = memory_of(tensor)
    assert not memory.is_conj() and not memory.is_neg()
    scale_([memory], torch.tensor(2.0, dtype=torch.float64))
    assert torch.equal(tensor.resolve_conj().resolve_neg(), doubled(before))
    assert once([memory])[0] is memory
    assert tensor._version > 0 or not tensor.numel()


def test_a_plain_tensor_is_its_own_memory():
    tensor = torch.ones(3, requires_grad=True)
    assert memory_of(tensor) is tensor


@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (3, 1)], ids=str)
def test_a_tensor_that_overlaps_itself_is_refused(strides):
    windows = torch.arange(20.0).as_strided((3, 4), strides)
    with pytest.raises(ValueError, match=r"shape \(3, 4\) and strides .* whose elements overlap"):
        memory_of(windows)


# ---- several tensors


def bytes_of(tensors: list[Tensor]) -> np.ndarray:
    """Every byte's address, as often as a tensor has it."""
    found = [np.zeros(0, dtype=np.int64)]
    for tensor in tensors:
        at = np.zeros(1, dtype=np.int64) + tensor.data_ptr()
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            at = (at[:, None] + np.arange(size) * stride * tensor.element_size()).reshape(-1)
        found.append((at[:, None] + np.arange(tensor.element_size())).reshape(-1))
    return np.sort(np.concatenate(found))


def assert_once(tensors: list[Tensor]) -> list[Tensor]:
    views = once(tensors)
    covered = bytes_of(views)
    assert len(np.unique(covered)) == len(covered), "some twice"
    assert np.array_equal(covered, np.unique(bytes_of(tensors))), "others than were given"
    return views


def test_tensors_apart_are_left_as_they_are():
    flat = torch.arange(100.0)
    matrix = torch.zeros(8, 6)
    tensors = [flat[50:], flat[:50], torch.ones(3), torch.zeros(0), flat[20:20], nn.Parameter(torch.ones(2))]
    tensors += [matrix[:, :2], matrix[:, 2:5], matrix[:, 5:], torch.ones(4, dtype=torch.complex128)]
    views = assert_once(tensors)
    assert {id(v) for v in views} == {id(t) for t in tensors}
    few = tensors[:4]
    assert [id(v) for v in once(few)] == [id(t) for t in few]
    assert once([]) == []


def test_a_tensor_given_twice_is_had_once():
    tensor, strided, other = torch.ones(3), torch.zeros(4, 4)[:, ::2], torch.ones(2)
    views = assert_once([tensor, strided, other, strided, tensor.view(3), strided[:]])
    assert len(views) == 3


def test_ranges_that_overlap_are_one_range():
    flat = torch.arange(100.0)
    views = assert_once([flat[10:40], flat[90:], flat[30:50], flat[:5], flat[12:14]])
    assert sorted(view.numel() for view in views) == [5, 10, 40]
    (whole,) = assert_once([flat.view(10, 10).t(), flat[3:30]])
    assert whole.numel() == 100
    columns = flat.view(10, 10)
    (whole,) = assert_once([columns[:, :6], columns[:, 4:]])
    version = flat._version
    scale_([whole], HALF)
    assert torch.equal(flat, torch.arange(100.0) * 0.5)
    assert flat._version > version, "autograd is told"


@pytest.mark.parametrize(
    ("make", "fact"),
    [
        (lambda flat: [flat, flat.view(torch.bfloat16)[4:10]], "one dtype, found torch.bfloat16 and"),
        (lambda flat: [flat[:6].view(torch.int32), flat], "one dtype, found torch.float32 and torch.int32"),
        (lambda flat: [flat[::2], flat[::3]], "a whole run of memory"),
        (lambda flat: [flat.view(4, 6)[:, :3], flat.view(4, 6)[:2, :4]], "a whole run of memory"),
        (
            lambda flat: [flat[:8], flat.view(torch.uint8)[2:34].view(torch.uint8)],
            "one dtype, found",
        ),
        (
            lambda flat: [flat[:8], torch.from_numpy(flat.numpy()[4:])],
            "one storage, found several",
        ),
    ],
)
def test_what_no_view_covers_once_is_refused_by_position(make, fact):
    flat = torch.arange(24.0)
    with pytest.raises(SharedMemoryError, match=fact) as caught:
        once([torch.ones(5), *make(flat), torch.ones(2)])
    assert caught.value.positions == (1, 2)


def test_random_views_of_one_buffer():
    """Against a count of every byte."""
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        flat = torch.zeros(60)
        tensors = []
        for _ in range(generator.integers(1, 5)):
            start, rows, columns, stride = generator.integers((0, 1, 1, 1), (20, 4, 5, 9))
            if start + (rows - 1) * stride + columns <= 60 and (stride >= columns or rows == 1):
                tensors.append(flat.as_strided((rows, columns), (stride, 1), start))
        try:
            assert_once(tensors)
        except SharedMemoryError as error:
            refused += 1
            first, second = error.positions
            assert first != second
            pair = [tensors[first], tensors[second]]
            assert len(np.unique(bytes_of(pair))) < len(bytes_of(pair)), "they share nothing"
    assert 0 < refused < 150


def test_in_a_dry_run_a_tensor_given_twice_is_had_once():
    with FakeTensorMode():
        tensor, other = torch.ones(3), torch.ones(3)
    meta = torch.ones(2, device="meta")
    views = once([tensor, other, meta, tensor, meta])
    assert [id(view) for view in views] == [id(tensor), id(other), id(meta)]
    assert memory_of(tensor.expand(2, 3)).shape == (1, 3)


def test_a_tensor_without_addresses_hides_no_sharing_of_others():
    flat, meta = torch.zeros(6), torch.ones(2, device="meta")
    views = once([meta, flat[:4], meta, flat[2:]])
    assert sorted(view.numel() for view in views) == [2, 6]
    with pytest.raises(SharedMemoryError) as caught:
        once([meta, flat, meta, flat.view(torch.int32)])
    assert caught.value.positions == (1, 3)
