"""Headers of npy files: those that numpy writes are read, and a hostile one is a ValueError whatever it holds."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest

from data_pipeline.format.npy import LONGEST_HEADER, Header, header_of


def npy(header: str, version: int = 1) -> bytes:
    content = header.encode("latin1")
    return (
        b"\x93NUMPY"
        + bytes([version, 0])
        + len(content).to_bytes(2 if version == 1 else 4, "little")
        + content
        + bytes(64)
    )


def read(data: bytes) -> Header:
    return header_of(data[:LONGEST_HEADER], len(data))


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("array", [np.ones((2, 3, 4), np.float16), np.ones((3, 2), ">f8", "F"), np.array(["a", "bc"])])
def test_what_numpy_writes_is_read(array: np.ndarray, version: tuple[int, int]) -> None:
    buffer = BytesIO()
    np.lib.format.write_array(buffer, array, version=version)
    header = read(buffer.getvalue())
    assert (header.dtype, header.shape) == (array.dtype, array.shape)
    found = np.frombuffer(buffer.getvalue(), header.dtype, array.size, header.offset)
    np.testing.assert_array_equal(found.reshape(header.shape, order=header.order), array)


PLAIN = "{'descr': '<f2', 'fortran_order': False, 'shape': (2, 3)}"


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("(" * 2000, "cannot be read"),
        ("[" * 1500 + "]" * 1500, "cannot be read"),
        ("-" * 3500 + "1", "cannot be read"),
        ("'''", "cannot be read"),
        ("  indented\n x", "cannot be read"),
        ("\0", "cannot be read"),
        ("__import__('os').system('true')", "cannot be read"),
        (PLAIN.replace("'<f2'", "{1: 2}"), "cannot be read"),
        (PLAIN.replace("(2, 3)", "[2, 3]"), "cannot be read"),
        (PLAIN.replace("(2, 3)", "(2.5,)"), "cannot be read"),
        (PLAIN + " " * LONGEST_HEADER, "cannot be read, or of more than 4096 bytes"),
        (PLAIN.replace("(2, 3)", "(-1,)"), "an impossible shape"),
        (PLAIN.replace("(2, 3)", f"({'9' * 3900},)"), "its header says|cannot be read"),
        (PLAIN.replace("(2, 3)", "(8888888, 8888888)"), "its header says"),
        (PLAIN.replace("'<f2'", "('<f2', (1000000000,))"), "its header says"),
        (PLAIN.replace("'<f2'", "'|O'"), "pickled objects, which are never loaded"),
        (PLAIN.replace("'<f2'", "[('a', '|O')]"), "pickled objects, which are never loaded"),
    ],
)
def test_a_hostile_header_is_refused(header: str, message: str, version: int) -> None:
    assert read(npy(PLAIN, version)).shape == (2, 3)
    with pytest.raises(ValueError, match=message):
        read(npy(header, version))


@pytest.mark.parametrize("data", [b"", b"PK\x05\x06" + bytes(18), npy(PLAIN)[:7], npy(PLAIN, 9), npy(PLAIN)[:20]])
def test_what_is_no_npy_file_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="npy"):
        read(data)
