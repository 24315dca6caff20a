"""What the tests of the data share."""

from contextlib import contextmanager

import pytest

from diffusion.errors import UserError


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
