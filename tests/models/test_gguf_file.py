"""Our reader of GGUF files against the gguf package's own."""

import struct

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from hypothesis import given
from hypothesis import strategies as st

from models import CheckpointError
from models.checkpoints.gguf_file import GgufFile
from models.hub import smollm2_gguf

STRING, ARRAY, U32 = 8, 9, 4


def text(value):
    return struct.pack("<Q", len(value)) + value


def header(*pairs, tensors=b"", num_tensors=0, version=3):
    """A file's bytes; a pair is a key, its type and the bytes of its value."""
    start = b"GGUF" + struct.pack("<IQQ", version, num_tensors, len(pairs))
    return start + b"".join(text(key) + struct.pack("<I", kind) + value for key, kind, value in pairs) + tensors


def tensor(name, *shape, kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


@pytest.fixture
def opened(tmp_path):
    def write_and_open(data):
        (tmp_path / "model.gguf").write_bytes(data)
        return GgufFile(tmp_path / "model.gguf")

    return write_and_open


def assert_same_as_gguf(path):
    theirs, ours = GGUFReader(path), GgufFile(path)
    expected = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert ours.metadata(lambda key: True) == expected
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        found = ours.tensors[tensor.name]
        assert (found.kind, found.shape) == (tensor.tensor_type, tuple(reversed(tensor.shape.tolist())))
        assert found.data.tobytes() == tensor.data.tobytes()


def test_smollm2_reads_as_by_gguf():
    assert_same_as_gguf(smollm2_gguf())


numbers = st.integers(0, 200) | st.floats(width=32, allow_nan=False) | st.booleans()
values = numbers | st.text() | st.lists(st.text(), min_size=1) | st.lists(st.integers(-5, 5), min_size=1)


@given(
    metadata=st.dictionaries(st.text(min_size=1), values, max_size=6),
    shapes=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3), max_size=4),
)
def test_any_metadata_and_tensors_read_as_by_gguf(tmp_path_factory, metadata, shapes):
    path = tmp_path_factory.mktemp("any") / "model.gguf"
    writer = GGUFWriter(path, "llama")
    for key, value in metadata.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(f"key.{key}", value)
    for index, shape in enumerate(shapes):
        writer.add_tensor(f"tensor {index}", np.random.default_rng(index).normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert_same_as_gguf(path)


def test_every_kind_of_number_an_empty_array_and_arrays_of_arrays(opened):
    kinds = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
    array = struct.pack("<IQ", 3, 2) + struct.pack("<hh", -1, 7)
    file = opened(
        header(
            *((f"kind {kind}".encode(), kind, struct.pack(f"<{letter}", 1)) for kind, letter in kinds.items()),
            (b"empty", ARRAY, struct.pack("<IQ", U32, 0)),
            (b"nested", ARRAY, struct.pack("<IQ", ARRAY, 2) + array + array),
        )
    )
    found = file.metadata(lambda key: True)
    assert [found[f"kind {kind}"] for kind in kinds] == [1] * len(kinds)
    assert (found["empty"], found["nested"]) == ([], [[-1, 7], [-1, 7]])
    assert file.metadata(lambda key: key == "empty") == {"empty": []}


def test_only_what_is_asked_for_must_be_text(opened):
    file = opened(
        header((b"good", STRING, text("né".encode())), (b"bad", ARRAY, struct.pack("<IQ", 8, 1) + text(b"\xff")))
    )
    assert file.metadata(lambda key: key == "good") == {"good": "né"}
    with pytest.raises(CheckpointError, match=r"model\.gguf: bad isn't text"):
        file.metadata(lambda key: True)


def test_tensors_begin_at_the_files_own_alignment(opened):
    data = header((b"general.alignment", U32, struct.pack("<I", 256)), tensors=tensor(b"x", 2, 1), num_tensors=1)
    file = opened(data.ljust(256, b"\0") + struct.pack("<2f", 3, 4))
    assert file.tensors["x"].shape == (1, 2)
    assert file.tensors["x"].data.view(np.float32).tolist() == [[3, 4]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GGUF", "cut short"),
        (header(version=1), "version 0x1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version 0x3000000, expected little-endian"),
        (header((b"a", U32, b"1234"), (b"a", U32, b"1234")), "'a' comes twice"),
        (header((b"a", 99, b"")), "99 is not a valid GGUFValueType"),
        (header((b"a", STRING, struct.pack("<Q", 2**63))), "runs past the end"),
        (header((b"a", ARRAY, struct.pack("<IQ", STRING, 2**63))), "cut short"),
        (header((b"a", ARRAY, struct.pack("<IQ", U32, 2**40))), "cut short"),
        (header((b"a", ARRAY, struct.pack("<IQ", ARRAY, 1) * 5000)), "cut short"),
        (header((b"general.alignment", U32, struct.pack("<I", 24))), "alignment 24, expected a power of two"),
        (header(tensors=tensor(b"x", 1) * 2, num_tensors=2), "tensor 'x' comes twice"),
        (header(tensors=tensor(b"x", 2**32, 2**32), num_tensors=1), "cut short"),
        (header(tensors=tensor(b"x", 4, offset=2**62), num_tensors=1), "cut short"),
        (header(tensors=tensor(b"x", 33, kind=2), num_tensors=1), "not a multiple of Q4_0 block size"),
    ],
)
def test_damage_is_named(opened, data, message):
    with pytest.raises(CheckpointError, match=rf"model\.gguf \({len(data)} bytes\) .*{message}"):
        opened(data)
