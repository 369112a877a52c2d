"""Values read back are those of the moment they were asked for; neither way costs a wait for other work."""

import pytest
import torch

from trainer.transfer import Readback, send


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


@pytest.mark.gpu
def test_sending_does_not_wait_for_the_gpu():
    tensor = torch.arange(2**20)
    send(tensor, torch.device("cuda"))  # page-locked memory is there
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)
    sent = send(tensor, torch.device("cuda"))
    assert not torch.cuda.current_stream().query()
    assert torch.equal(sent.cpu(), tensor)
