"""Memory crosses the border without a copy, is freed once, and is refused when its descriptor can
not be believed.
"""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch

import capsules
from zerort import _core
from zerort.errors import LayoutError

DTYPES = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float64: "f64",
    torch.uint8: "u8",
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_pointer_seen_in_rust_is_that_of_torch(dtype: torch.dtype) -> None:
    tensor = torch.zeros(3, 5, dtype=dtype)
    buffer = _core.Buffer(tensor)
    assert buffer.data_ptr == tensor.data_ptr()
    assert (buffer.numel, buffer.dtype, buffer.device) == (15, DTYPES[dtype], (1, 0))
    assert buffer.__dlpack_device__() == (1, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_goes_out_again_is_the_same_memory(dtype: torch.dtype) -> None:
    tensor = torch.zeros(24, dtype=dtype)
    again = torch.from_dlpack(_core.Buffer(tensor))
    assert (again.dtype, again.data_ptr(), again.shape) == (dtype, tensor.data_ptr(), tensor.shape)
    again[7] = 3
    assert tensor[7] == 3


def test_what_a_kernel_writes_torch_sees_and_the_other_way_round() -> None:
    chunks, accum = torch.ones(8), torch.zeros(4)
    source, target = _core.Buffer(chunks), _core.Buffer(accum)
    _core.reduce(source, target, world=2, scale=1.0, add=False)
    assert accum.tolist() == [2.0] * 4
    accum.fill_(3.0)
    assert _core.squared_norm(target) == 36.0


def test_a_view_is_taken_where_it_starts() -> None:
    tensor = torch.arange(32.0)
    buffer = _core.Buffer(tensor[5:9])
    assert (buffer.data_ptr, buffer.numel) == (tensor.data_ptr() + 20, 4)
    assert torch.equal(torch.from_dlpack(buffer), tensor[5:9])


def test_numpy_memory_is_taken_and_given_too() -> None:
    array = np.arange(6, dtype=np.float64)
    buffer = _core.Buffer(array)
    again = np.from_dlpack(buffer)
    again[2] = 9.0
    assert array[2] == 9.0
    assert buffer.data_ptr == array.ctypes.data


def test_the_tensor_outlives_the_buffer() -> None:
    made = capsules.make(numel=8)
    tensor = torch.from_dlpack(_core.Buffer(made.capsule).slice(2, 4))
    gc.collect()
    tensor.fill_(1.5)
    assert (made.deleted, tensor.data_ptr(), tensor.sum().item()) == (0, made.address + 8, 6.0)
    del tensor
    gc.collect()
    assert made.deleted == 1


def test_the_buffer_outlives_the_tensor() -> None:
    tensor = torch.full((1 << 20,), 2.0)
    buffer = _core.Buffer(tensor)
    del tensor
    gc.collect()
    others = [torch.zeros(1 << 20) for _ in range(4)]  # would take the memory if it were free
    assert _core.squared_norm(buffer) == 4.0 * (1 << 20)
    assert len(others) == 4


def test_the_memory_is_freed_once_when_the_last_part_is_gone() -> None:
    made = capsules.make(numel=64)
    buffer = _core.Buffer(made.capsule)
    parts = [buffer.slice(start, 8) for start in range(0, 64, 8)]
    del buffer
    assert made.deleted == 0
    parts.clear()
    assert made.deleted == 1
    made.capsule = None
    gc.collect()
    assert made.deleted == 1


@pytest.mark.parametrize("max_version", [None, (0, 8), (1, 0), (1, 3), (2, 0)])
def test_a_capsule_that_nobody_takes_frees_itself(max_version: tuple[int, int] | None) -> None:
    made = capsules.make()
    capsule = _core.Buffer(made.capsule).__dlpack__(max_version=max_version)
    versioned = max_version is not None and max_version >= (1, 0)
    assert capsules.name(capsule) == ("dltensor_versioned" if versioned else "dltensor")
    assert made.deleted == 0
    del capsule
    assert made.deleted == 1


@pytest.mark.parametrize("max_version", [None, (1, 0)])
def test_versioned_and_unversioned_capsules_are_taken(max_version: tuple[int, int] | None) -> None:
    tensor = torch.arange(4.0)
    try:
        capsule = tensor.__dlpack__(max_version=max_version)
    except TypeError:
        pytest.skip(
            f"torch {torch.__version__} exports unversioned capsules only, and takes no max_version"
        )
    buffer = _core.Buffer(capsule)
    assert capsules.name(capsule).startswith("used_dltensor")
    assert (
        torch.from_dlpack(buffer.__dlpack__(max_version=max_version)).data_ptr()
        == tensor.data_ptr()
    )
    with pytest.raises(LayoutError, match="has been used"):
        _core.Buffer(capsule)


def test_a_producer_from_before_versions_is_asked_again() -> None:
    class Old:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

        def __dlpack__(self, stream: Any = None) -> Any:
            return self.tensor.__dlpack__()

        def __dlpack_device__(self) -> tuple[int, int]:
            return (1, 0)

    tensor = torch.zeros(3)
    assert _core.Buffer(Old(tensor)).data_ptr == tensor.data_ptr()


def test_an_interrupt_of_the_producer_is_not_taken_for_a_refusal() -> None:
    class Interrupted:
        def __dlpack__(self, **_: Any) -> Any:
            raise KeyboardInterrupt

        def __dlpack_device__(self) -> tuple[int, int]:
            return (1, 0)

    with pytest.raises(KeyboardInterrupt):
        _core.Buffer(Interrupted())


@pytest.mark.parametrize("start", [0, 5, 16])
def test_a_part_without_elements_is_a_tensor_without_elements(start: int) -> None:
    tensor = torch.zeros(16)
    empty = torch.from_dlpack(_core.Buffer(tensor).slice(start, 0))
    assert (empty.shape, empty.dtype) == ((0,), torch.float32)


def test_an_empty_tensor_may_have_no_pointer() -> None:
    buffer = _core.Buffer(capsules.make(numel=0, address=0).capsule)
    assert (buffer.numel, buffer.data_ptr) == (0, 0)
    assert torch.from_dlpack(buffer).numel() == 0
    assert (_core.squared_norm(buffer), _core.first_nonfinite(buffer)) == (0.0, None)


def test_a_scalar_tensor_is_one_element() -> None:
    assert _core.Buffer(torch.tensor(2.5)).numel == 1


def test_strides_of_single_rows_do_not_matter() -> None:
    made = capsules.make(numel=12, shape=[1, 12, 1], strides=[777, 1, -5])
    assert _core.Buffer(made.capsule).numel == 12


def test_a_byte_offset_moves_the_pointer() -> None:
    made = capsules.make(numel=8, byte_offset=16)
    buffer = _core.Buffer(made.capsule)
    assert buffer.data_ptr == made.address + 16
    assert capsules.read(buffer.__dlpack__()).byte_offset == 0


REFUSED_TENSORS = {
    "contiguous": lambda: torch.zeros(4, 4).t(),
    "contiguous; got shape [2] with strides [2]": lambda: torch.zeros(4)[::2],
    "dtype": lambda: torch.zeros(4, dtype=torch.int64),
    "DLPack type code 5": lambda: torch.zeros(4, dtype=torch.complex64),
    "require gradient": lambda: torch.zeros(4, requires_grad=True),
    "misaligned": lambda: np.frombuffer(bytearray(17), dtype=np.uint8)[1:].view(np.float32),
    "does not share its memory": lambda: torch.zeros(4, device="meta"),
    "object with __dlpack__; got a list": lambda: [1.0],
}


@pytest.mark.parametrize("why", REFUSED_TENSORS)
def test_memory_that_can_not_be_shared_is_refused_with_the_reason(why: str) -> None:
    with pytest.raises(LayoutError) as refused:
        _core.Buffer(REFUSED_TENSORS[why]())
    assert why in str(refused.value)


def test_read_only_memory_is_refused() -> None:
    array = np.zeros(4, dtype=np.float32)
    array.flags.writeable = False
    with pytest.raises(LayoutError, match=r"read-?only"):
        _core.Buffer(array)


def test_a_refusal_of_the_producer_is_the_cause() -> None:
    with pytest.raises(LayoutError) as refused:
        _core.Buffer(torch.zeros(4, requires_grad=True))
    assert isinstance(refused.value.__cause__, BufferError | RuntimeError)


REFUSED_DESCRIPTORS: dict[str, dict[str, Any]] = {
    "read-only": {"flags": capsules.READ_ONLY},
    "DLPack version 1; got 2.0": {"version": (2, 0)},
    "DLPack device type 0": {"device": (0, 0)},
    "4 lanes": {"dtype": (capsules.FLOAT, 32, 4)},
    "code 2 of 8 bits": {"dtype": (capsules.FLOAT, 8, 1)},
    "code 0 of 32 bits": {"dtype": (capsules.SIGNED, 32, 1)},
    "contiguous": {"shape": [4, 4], "strides": [1, 4]},
    "strides [0]": {"shape": [16], "strides": [0]},
    "strides [-1]": {"shape": [16], "strides": [-1]},
    "negative extent": {"shape": [-1, -16]},
    "more elements than": {"shape": [1 << 40, 1 << 40]},
    "negative number of dimensions": {"ndim": -1},
    "past the last address": {"shape": [1 << 62]},
    "offset 18446744073709551608": {"byte_offset": (1 << 64) - 8},
    "null pointer": {"address": 0},
    "misaligned: f32 lies on multiples of 4": {"byte_offset": 2},
}


@pytest.mark.parametrize("why", REFUSED_DESCRIPTORS)
def test_a_descriptor_that_can_not_be_believed_is_refused_and_its_memory_freed_once(
    why: str,
) -> None:
    made = capsules.make(**REFUSED_DESCRIPTORS[why])
    with pytest.raises(LayoutError) as refused:
        _core.Buffer(made.capsule)
    assert why in str(refused.value)
    del refused
    made.capsule = None
    gc.collect()
    assert made.deleted == 1


@pytest.mark.parametrize("why", ["DLPack device type 0", "negative extent", "null pointer"])
def test_unversioned_descriptors_are_checked_too(why: str) -> None:
    made = capsules.make(**REFUSED_DESCRIPTORS[why], version=None)
    with pytest.raises(LayoutError, match=why):
        _core.Buffer(made.capsule)
    assert made.deleted == 1


def test_a_capsule_of_something_else_is_refused() -> None:
    import datetime

    with pytest.raises(LayoutError, match="not one of DLPack's"):
        _core.Buffer(datetime.datetime_CAPI)  # type: ignore[attr-defined]


def test_an_object_whose_dlpack_is_no_capsule_is_refused() -> None:
    class Wrong:
        def __dlpack__(self, **_: Any) -> Any:
            return 7

        def __dlpack_device__(self) -> tuple[int, int]:
            return (1, 0)

    with pytest.raises(LayoutError, match="PyCapsule"):
        _core.Buffer(Wrong())


@pytest.mark.parametrize(
    ("start", "length"), [(0, 17), (17, 0), (16, 1), (-1, 2), (3, -1), (2**62, 2**62)]
)
def test_a_slice_beyond_the_buffer_is_refused(start: int, length: int) -> None:
    with pytest.raises(LayoutError):
        _core.Buffer(torch.zeros(16)).slice(start, length)


def test_a_slice_of_a_slice_counts_from_its_own_start() -> None:
    tensor = torch.arange(16.0)
    part = _core.Buffer(tensor).slice(4, 8).slice(2, 3)
    assert torch.from_dlpack(part).tolist() == [6.0, 7.0, 8.0]
    with pytest.raises(LayoutError):
        part.slice(0, 4)


def test_an_export_makes_no_copy_and_moves_nowhere() -> None:
    buffer = _core.Buffer(torch.zeros(4))
    with pytest.raises(BufferError, match="no copy"):
        buffer.__dlpack__(copy=True)
    with pytest.raises(BufferError, match="stays on its device"):
        buffer.__dlpack__(dl_device=(capsules.CUDA, 0))
    assert capsules.name(buffer.__dlpack__(copy=False, dl_device=(1, 0), stream=None)) == "dltensor"


class TestAccelerator:
    """Without one: capsules that say so are described faithfully and never touched."""

    ADDRESS = 0x7F00_0000_0000

    @pytest.fixture(params=[capsules.CUDA, capsules.ROCM, capsules.ONE_API])
    def kind(self, request: pytest.FixtureRequest) -> int:
        kind: int = request.param
        return kind

    @pytest.fixture
    def made(self, kind: int) -> capsules.Made:
        return capsules.make(
            numel=0,
            address=self.ADDRESS,
            shape=[64],
            device=(kind, 3),
            dtype=(capsules.BFLOAT, 16, 1),
        )

    def test_its_descriptor_goes_through_unchanged(self, kind: int, made: capsules.Made) -> None:
        buffer = _core.Buffer(made.capsule)
        assert buffer.device == buffer.__dlpack_device__() == (kind, 3)
        assert buffer.dtype == "bf16"
        capsule = buffer.slice(8, 4).__dlpack__(stream=1, max_version=(1, 0), dl_device=(kind, 3))
        tensor = capsules.read(capsule)
        assert (tensor.data, tensor.byte_offset) == (self.ADDRESS + 16, 0)
        assert (tensor.device_type, tensor.device_id) == (kind, 3)
        assert (tensor.code, tensor.bits, tensor.lanes) == (capsules.BFLOAT, 16, 1)
        assert (tensor.ndim, tensor.shape[0], tensor.strides[0]) == (1, 4, 1)
        del buffer, capsule
        assert made.deleted == 1

    def test_a_kernel_refuses_it(self, made: capsules.Made) -> None:
        buffer = _core.Buffer(made.capsule)
        host = _core.Buffer(torch.zeros(64))
        for call in (
            lambda: _core.squared_norm(buffer),
            lambda: _core.first_nonfinite(buffer),
            lambda: _core.reduce(buffer, host, world=1, scale=1.0, add=False),
            lambda: _core.reduce(host, buffer, world=1, scale=1.0, add=False),
        ):
            with pytest.raises(LayoutError, match="not in host memory was given to a CPU kernel"):
                call()

    def test_the_producer_is_asked_for_no_stream_order(
        self, kind: int, made: capsules.Made
    ) -> None:
        asked: list[dict[str, Any]] = []

        class Producer:
            def __dlpack__(self, **options: Any) -> Any:
                asked.append(options)
                return made.capsule

            def __dlpack_device__(self) -> tuple[int, int]:
                return (kind, 3)

        _core.Buffer(Producer())
        assert asked == [{"stream": -1, "max_version": (1, 0)}]


@pytest.mark.parametrize("kind", [capsules.CUDA_HOST, capsules.ROCM_HOST])
def test_pinned_memory_is_host_memory(kind: int) -> None:
    made = capsules.make(device=(kind, 0))
    assert _core.squared_norm(_core.Buffer(made.capsule)) == 0.0


class TestBuckets:
    """The core keeps the partition's books: a bucket's buffer hands out its own shards and
    parameters.
    """

    @pytest.fixture
    def plan(self) -> _core.Plan:
        params = [
            (3, "f32", 0, 0),
            (100, "f32", 0, 0),
            (0, "f32", 0, 0),
            (700, "f32", 0, 0),
            (5, "bf16", 1, 0),
        ]
        return _core.Plan(params, world=3, stage=2, cap_elements=10_000)

    def test_shards_tile_the_buffer(self, plan: _core.Plan) -> None:
        for bucket in plan.buckets:
            flat = torch.arange(bucket.numel, dtype=torch.float32)
            buffer = _core.Buffer(flat, plan, bucket.id)
            shards = [torch.from_dlpack(buffer.shard(rank)) for rank in range(3)]
            assert [shard.numel() for shard in shards] == [bucket.shard_numel] * 3
            assert torch.equal(torch.cat(shards), flat)
            assert shards[1].data_ptr() == flat.data_ptr() + 4 * bucket.shard_numel

    def test_a_fragment_is_the_whole_parameter_and_can_be_written(self, plan: _core.Plan) -> None:
        for bucket in plan.buckets:
            flat = torch.zeros(bucket.numel)
            buffer = _core.Buffer(flat, plan, bucket.id)
            for param, offset, numel in zip(
                bucket.params, bucket.offsets, bucket.numels, strict=True
            ):
                view = torch.from_dlpack(buffer.fragment(param))
                view += param + 1
                assert view.numel() == numel
                assert torch.equal(flat[offset : offset + numel], torch.full((numel,), param + 1.0))

    def test_the_parts_have_no_bucket_of_their_own(self, plan: _core.Plan) -> None:
        shard = _core.Buffer(torch.zeros(plan.buckets[0].numel), plan, 0).shard(0)
        with pytest.raises(LayoutError, match="give plan and bucket"):
            shard.shard(0)

    def test_accumulators_may_have_another_dtype(self, plan: _core.Plan) -> None:
        bucket = next(bucket for bucket in plan.buckets if bucket.dtype == "bf16")
        for dtype in (torch.float32, torch.bfloat16):
            buffer = _core.Buffer(torch.zeros(bucket.numel, dtype=dtype), plan, bucket.id)
            assert torch.from_dlpack(buffer.fragment(4)).shape == (5,)

    def test_what_is_not_that_bucket_is_refused_with_the_reason(self, plan: _core.Plan) -> None:
        numel = plan.buckets[0].numel
        flat = torch.zeros(numel + 128)
        refused: dict[str, tuple[Any, ...]] = {
            f"{numel} elements, padding included; got {numel - 1}": (flat[: numel - 1], plan, 0),
            "misaligned: a bucket starts on 64 bytes": (flat[1 : numel + 1], plan, 0),
            "unknown bucket 9": (flat[:numel], plan, 9),
            "unknown bucket -1": (flat[:numel], plan, -1),
            "go together": (flat[:numel], plan),
            "uint8": (torch.zeros(numel, dtype=torch.uint8), plan, 0),
        }
        for why, arguments in refused.items():
            with pytest.raises(LayoutError, match=why):
                _core.Buffer(*arguments)

    def test_parts_that_do_not_exist_are_refused(self, plan: _core.Plan) -> None:
        bucket = next(bucket for bucket in plan.buckets if bucket.dtype == "bf16")
        buffer = _core.Buffer(torch.zeros(bucket.numel), plan, bucket.id)
        refused = {
            "unknown rank 3": lambda: buffer.shard(3),
            "unknown rank -1": lambda: buffer.shard(-1),
            "unknown parameter 5": lambda: buffer.fragment(5),
            "unknown parameter -1": lambda: buffer.fragment(-1),
            f"lies in bucket {1 - bucket.id}, not in bucket {bucket.id}": lambda: buffer.fragment(
                0
            ),
        }
        for why, call in refused.items():
            with pytest.raises(LayoutError, match=why):
                call()
