"""What all tests share."""

from contextlib import contextmanager

import pytest
import torch

from diffusion.errors import UserError


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """The tensors here are small: on a busy machine threads that wait for each other take ten times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def user_error():
    """A context that expects a `UserError` of one line that names every given text."""

    @contextmanager
    def expect(*texts):
        with pytest.raises(UserError) as caught:
            yield
        message = str(caught.value)
        assert "\n" not in message
        for text in texts:
            assert str(text) in message

    return expect
