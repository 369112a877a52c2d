"""Values read back are those of the moment they were asked for, and cost no wait for later work."""

import pytest
import torch

from trainer.readback import Readback


def test_values_are_those_of_the_moment_on_a_cpu():
    values = torch.tensor([1.0, 2.0])
    seen = Readback(values)
    values.add_(1)
    assert seen.tolist() == [1.0, 2.0]


@pytest.mark.gpu
def test_a_gpu_is_not_waited_for_beyond_them():
    values = torch.tensor([1, 2], device="cuda")
    seen = Readback(values)
    values.add_(1)
    torch.cuda._sleep(2_000_000_000)  # a second of work
    assert seen.tolist() == [1, 2]
    assert not torch.cuda.current_stream().query()
    torch.cuda.synchronize()
