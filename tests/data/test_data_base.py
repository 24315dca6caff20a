"""In-memory and streamed data: exact grey values, exact order, one interface; bad values are named."""

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from diffusion.data import StreamedData, TensorData, to_uint8
from diffusion.data.base import fixed_split
from diffusion.errors import UserError

GREYS = torch.arange(256, dtype=torch.uint8).reshape(16, 1, 4, 4)
ORDER = [torch.tensor([3, 1, 1]), torch.tensor([15]), torch.tensor([0, 14, 7, 2, 9])]


class Items(Dataset):
    """Image i of GREYS with label i % 3; item 14 is broken on request."""

    def __init__(self, broken=False):
        self.broken = broken

    def __len__(self):
        return 16

    def __getitem__(self, index):
        if self.broken and index == 14:
            raise UserError("a/b.png cannot be decoded: repair it")
        return GREYS[index], index % 3


def in_memory():
    return TensorData(GREYS, torch.arange(16) % 3, num_classes=3)


def test_images_are_in_minus_one_to_one():
    x = TensorData(GREYS).take(torch.arange(16)).x
    assert x.dtype == torch.float32
    expected = np.arange(256, dtype=np.float64) / 127.5 - 1
    np.testing.assert_allclose(x.flatten().double().numpy(), expected, rtol=0, atol=1.2e-7)
    assert x.min() == -1 and x.max() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_grey_value_survives_the_round_trip(dtype):
    x = TensorData(GREYS).take(torch.arange(16)).x.to(dtype)
    assert torch.equal(to_uint8(x), GREYS)


def test_to_uint8_rounds_to_the_nearest_and_clamps():
    values = torch.tensor([100.4, 100.6, -30.0, 300.0, 0.4, 254.6])
    assert to_uint8(values / 127.5 - 1).tolist() == [100, 101, 0, 255, 0, 255]


def test_to_uint8_refuses_nan(user_error):
    x = torch.zeros(2, 1, 2, 2)
    x[1, 0, 0, 1] = float("nan")
    with user_error("1 of 8", "NaN"):
        to_uint8(x)


def test_points_and_labels_are_taken_by_index():
    points = torch.arange(10.0).reshape(5, 2)
    data = TensorData(points, torch.tensor([0, 1, 2, 1, 0]), num_classes=3)
    x, label = data.take(torch.tensor([4, 2]))
    assert torch.equal(x, torch.tensor([[8.0, 9.0], [4.0, 5.0]]))
    assert label.tolist() == [0, 2]
    assert data.shape == (2,) and len(data) == 5 and not data.is_image
    x.zero_()
    assert torch.equal(data.values, torch.arange(10.0).reshape(5, 2))


def test_no_labels_stay_none():
    assert TensorData(GREYS).take(torch.tensor([0])).label is None
    assert StreamedData(Items(), workers=0).take(torch.tensor([0])).label is None


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_follow_the_order_in_memory_and_streamed(workers):
    expected = [(GREYS[index].float() / 127.5 - 1, index % 3) for index in ORDER]
    streamed = StreamedData(Items(), num_classes=3, workers=workers)
    assert (streamed.shape, streamed.num_classes, len(streamed), streamed.is_image) == ((1, 4, 4), 3, 16, True)
    for data in (in_memory(), streamed, streamed.in_memory()):
        batches = list(data.batches(iter(ORDER)))
        assert len(batches) == len(ORDER)
        for index, batch, (x, label) in zip(ORDER, batches, expected, strict=True):
            torch.testing.assert_close(batch.x, x, rtol=0, atol=1e-6)
            assert torch.equal(batch.label, label)
            taken = data.take(index)
            assert torch.equal(taken.x, batch.x) and torch.equal(taken.label, batch.label)


def test_in_memory_batches_are_lazy():
    seen = []

    def order():
        for start in range(4):
            seen.append(start)
            yield torch.tensor([start])

    batches = in_memory().batches(order())
    next(batches)
    next(batches)
    assert seen == [0, 1]


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_leaves_the_global_random_state_alone(workers):
    before = torch.get_rng_state()
    list(StreamedData(Items(), workers=workers).batches(ORDER))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_while_decoding_keeps_its_one_line(workers):
    data = StreamedData(Items(broken=True), workers=workers)
    with pytest.raises(UserError) as caught:
        list(data.batches(ORDER))
    assert str(caught.value) == "a/b.png cannot be decoded: repair it"


def test_to_moves_values_labels_and_batches():
    moved = in_memory().to("meta")
    assert moved.values.device.type == moved.labels.device.type == "meta" and moved.num_classes == 3
    streamed = StreamedData(Items(), num_classes=3, workers=0).to("meta")
    batch = next(streamed.batches(ORDER))
    assert batch.x.device.type == batch.label.device.type == "meta" and streamed.num_classes == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("workers", [0, 2])
def test_cuda_gives_the_same_examples(workers):
    here = list(in_memory().batches(ORDER))
    for data in (in_memory().to("cuda"), StreamedData(Items(), num_classes=3, workers=workers).to("cuda")):
        for near, far in zip(here, data.batches(index.cuda() for index in ORDER), strict=True):
            assert far.x.device.type == far.label.device.type == "cuda"
            torch.testing.assert_close(far.x.cpu(), near.x, rtol=0, atol=1.2e-7)
            assert torch.equal(to_uint8(far.x).cpu(), to_uint8(near.x)) and torch.equal(far.label.cpu(), near.label)


@pytest.mark.parametrize(
    ("values", "labels", "num_classes", "texts"),
    [
        (GREYS[:, 0], None, 0, ["torch.uint8", "(16, 4, 4)", "(N, C, H, W)"]),
        (torch.zeros(3, 2, dtype=torch.float64), None, 0, ["torch.float64", "float32"]),
        (torch.zeros(3), None, 0, ["(3,)"]),
        (torch.zeros(0, 2), None, 0, ["(0, 2)", "at least one"]),
        (torch.tensor([[0.0, 1.0], [2.0, float("inf")]]), None, 0, ["row 1", "inf", "finite"]),
        (torch.zeros(3, 2), None, 4, ["num_classes is 4", "expected 0"]),
        (torch.zeros(3, 2), torch.tensor([0, 1, 0]), 0, ["num_classes is 0"]),
        (torch.zeros(3, 2), torch.tensor([0, 1]), 2, ["(2,)", "(3,)"]),
        (torch.zeros(3, 2), torch.tensor([0.0, 1.0, 0.0]), 2, ["torch.float32", "int64"]),
        (torch.zeros(3, 2), torch.tensor([0, 2, 1]), 2, ["label 2", "0 to 1"]),
        (torch.zeros(3, 2), torch.tensor([0, -1, 1]), 2, ["label -1", "0 to 1"]),
    ],
)
def test_bad_values_and_labels_are_named(user_error, values, labels, num_classes, texts):
    with user_error(*texts):
        TensorData(values, labels, num_classes)


def test_bad_streams_are_named(user_error):
    with user_error("workers is -1"):
        StreamedData(Items(), workers=-1)
    with user_error("no images"):
        StreamedData([])
    with user_error("torch.float32", "uint8"):
        StreamedData([(torch.zeros(1, 4, 4), 0)])


def test_fixed_split_is_ninety_to_ten_and_always_the_same(user_error):
    train, test = fixed_split(250)
    assert (len(train), len(test)) == (225, 25)
    assert torch.equal(torch.cat([train, test]).sort().values, torch.arange(250))
    assert torch.equal(fixed_split(250)[1], test)
    assert not torch.equal(test, torch.arange(25)) and not torch.equal(test, torch.arange(225, 250))
    assert [len(part) for part in fixed_split(2)] == [1, 1]
    with user_error("1 example", "at least 2"):
        fixed_split(1)
