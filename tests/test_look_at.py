"""`_core.look_at` over torch's memory, against torch."""

import math

import numpy as np
import pytest
import torch

from qwenlora import _core

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@pytest.mark.parametrize("name", DTYPES)
def test_findings_equal_those_of_torch(name):
    dtype, slots = DTYPES[name], 3
    shared = torch.randn(slots, 4, 16).to(dtype)
    other = shared.clone()
    other[1, 3, 15] += 1
    ups = [torch.randn(slots, 24, 4).to(dtype) for _ in range(3)]
    for up in ups:
        up[2] = -0.0
    tensors = [shared, ups[0], other, ups[1], shared, ups[2]]
    buffer = torch.cat([tensor.flatten().view(torch.uint8) for tensor in tensors])
    blocks, begin = [], 0
    for tensor in tensors:
        blocks.append((begin, tensor.nbytes // slots, name))
        begin += tensor.nbytes
    sharing, zero, peak = _core.look_at(buffer.numpy(), blocks, slots, measure=True)
    assert sharing == [(0, 0, 0), (0, 1, 0), (0, 0, 0)]
    assert zero == [2]
    assert peak == max(tensor.abs().max().item() for tensor in tensors)

    alike = [blocks[0], blocks[1], blocks[4], blocks[5]]
    assert _core.look_at(buffer.numpy(), alike, slots, measure=False) == ([(0, 0)], [2], None)

    # The last value of all, where a vector's rest is looked at one by one.
    for extreme in (-math.inf, math.nan):
        buffer[-ups[2].element_size() :].view(dtype).fill_(extreme)
        *_, peak = _core.look_at(buffer.numpy(), blocks, slots, measure=True)
        assert peak == math.inf if extreme == -math.inf else math.isnan(peak)


def test_what_cannot_be_looked_at_is_named():
    buffer = np.zeros(64, dtype=np.uint8)
    pair = [(0, 32, "F32"), (32, 32, "F32")]
    with pytest.raises(ValueError, match=r"^block 1 begins at byte 32 and has 2 slots of 32 bytes"):
        _core.look_at(buffer, pair, 2, measure=False)
    with pytest.raises(ValueError, match=r"^blocks come in pairs of down and up, got 1$"):
        _core.look_at(buffer, pair[:1], 1, measure=False)
    with pytest.raises(ValueError, match=r"^unknown dtype: f32$"):
        _core.look_at(buffer, [(0, 4, "f32")], 1, measure=False)
    with pytest.raises(TypeError, match="uint8"):
        _core.look_at(buffer.view(np.float32), pair, 1, measure=False)
