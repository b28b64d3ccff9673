"""Parts of pickles and of checkpoints, to build files by hand that no program writes."""

import json
import pickle
import struct
import zipfile

import numpy as np


def text(value):
    """A short or long string as a pickle's opcode."""
    content = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(content)) + content


def integer(value):
    content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8b" + struct.pack("<I", len(content)) + content


def tensor(key=b"X\1\0\0\0000", count=b"K\4", shape=b"K\4\x85", strides=b"K\1\x85", offset=b"K\0"):
    """The opcodes of a torch tensor, by default of four numbers in the storage "0"."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + key + text("cpu") + count + b"tQ"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset + shape + strides + b"\x89NtR"


def doubled(opcodes, times=40):
    """A value that holds two of a value that holds two …: 2^40 parts."""
    return opcodes + b"".join(b"q%c0h%ch%c\x86" % (i, i, i) for i in range(times))


def torch_file(path, opcodes):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02](" + tensor() + opcodes + b"e.")
        archive.writestr("x/data/0", np.arange(4, dtype=np.float32).tobytes())


def legacy_file(path, opcodes):
    magic = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
    system = pickle.dumps({"little_endian": True}, protocol=2)
    content = magic + b"\x80\x02M\xe9\x03." + system + b"\x80\x02](" + tensor() + opcodes + b"e."
    storage = struct.pack("<q", 4) + np.arange(4, dtype=np.float32).tobytes()
    path.write_bytes(content + pickle.dumps(["0"], protocol=2) + storage)


def plain_file(path, opcodes):
    array = pickle.dumps(np.arange(4, dtype=np.float32), protocol=2)[2:-1]
    path.write_bytes(b"\x80\x02](" + array + opcodes + b"e.")


def safetensors(header, content=b"\0" * 4):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + content


def entry(shape=(1,), offsets=(0, 4), dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}
