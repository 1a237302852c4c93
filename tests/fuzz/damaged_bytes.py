"""Strategies that damage bytes, and what stands in bytes: instructions of a pickle, records of an archive."""

import io
import itertools
import pickletools
import zipfile

from hypothesis import strategies as st

type Draw = st.DrawFn

SIZES = (0, 1, 2**7, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1, 10**9)


@st.composite
def damaged_bytes(draw: Draw, content: bytes, *, most: int = 3) -> bytes:
    """Bits turned, bytes cut, doubled or put in, numbers of 1 to 8 bytes replaced; often near the start."""
    for _ in range(draw(st.integers(1, most))):
        size = len(content)
        if not size:
            return draw(st.binary(max_size=64))
        end = draw(st.sampled_from((min(size, 64), min(size, 1024), size)))
        at = draw(st.integers(0, end - 1))
        how = draw(st.sampled_from(("bit", "cut", "tail", "put", "double", "number", "zeros", "append")))
        if how == "bit":
            content = content[:at] + bytes([content[at] ^ (1 << draw(st.integers(0, 7)))]) + content[at + 1 :]
        elif how == "cut":
            content = content[:at] + content[at + draw(st.integers(1, 64)) :]
        elif how == "tail":
            content = content[:at]
        elif how == "put":
            content = content[:at] + draw(st.binary(min_size=1, max_size=32)) + content[at:]
        elif how == "double":
            content = content[:at] + content[at : at + draw(st.integers(1, 256))] + content[at:]
        elif how == "zeros":
            count = draw(st.integers(1, 64))
            content = content[:at] + bytes(count) + content[at + count :]
        elif how == "append":
            content += draw(st.sampled_from((b"\0", b"{}", b"\n", b"x", content[:256])))
        else:
            width, order = draw(st.sampled_from((1, 2, 4, 8))), draw(st.sampled_from(("little", "big")))
            number = draw(st.sampled_from(SIZES)) % 256**width
            content = content[:at] + number.to_bytes(width, order) + content[at + width :]
    return content


@st.composite
def damaged_pickle(draw: Draw, content: bytes) -> bytes:
    """Instructions of a pickle replaced by hostile ones, removed, doubled or moved; or its bytes damaged."""
    if draw(st.integers(0, 3)) == 0:
        return draw(damaged_bytes(content))
    starts = [position for _, _, position in pickletools.genops(content)] + [len(content)]
    instructions = [content[a:b] for a, b in itertools.pairwise(starts)]
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(instructions) - 1))
        how = draw(st.sampled_from(("put", "put", "replace", "remove", "double", "swap")))
        hostile = draw(st.sampled_from(INSTRUCTIONS))
        if how == "put":
            instructions.insert(at, hostile)
        elif how == "replace":
            instructions[at] = hostile
        elif how == "remove" and len(instructions) > 1:
            del instructions[at]
        elif how == "double":
            instructions.insert(at, instructions[at])
        else:
            other = draw(st.integers(0, len(instructions) - 1))
            instructions[at], instructions[other] = instructions[other], instructions[at]
    return b"".join(instructions)


INSTRUCTIONS = [
    b"cos\nsystem\n", b"cbuiltins\neval\n", b"cpathlib\nPosixPath\n", b"ctorch\nload\n",
    b"\x8c\x02os\x8c\x06system\x93", b"R", b"b", b"o", b"\x81", b"\x92", b"(", b"t", b"\x85", b"0", b"1", b"2", b"e",
    b"u", b"s", b"a", b".", b"Q", b"}", b"]", b"r\xff\xff\xff\xff", b"j\xff\xff\xff\xff", b"q\x00", b"h\xff",
    b"p99999999999999\n", b"g1\n", b"\x94", b"N", b"\x88", b"X\xff\xff\xff\x7f", b"B\xff\xff\xff\x7f",
    b"\x8d" + b"\xff" * 8, b"\x8e" + b"\xff" * 7 + b"\x7f", b"\x8b\xff\xff\xff\x7f", b"\x96" + b"\xff" * 8,
    b"\x95" + b"\xff" * 8, b"(" * 5000, b"]" * 5000, b"]" + b"\x85" * 5000, b"K\x01" * 5000, b"2" * 5000,
    b"I9" + b"9" * 5000 + b"\n", b"L-1L\n", b"Fnan\n", b"J\xff\xff\xff\x7f", b"\x8a\x08" + b"\xff" * 7 + b"\x7f",
    b"G" + b"\x7f\xf0" + b"\0" * 6, b"\x80\x05", b"\x80\xff", b"P0\n", b"\x97", b"\x98", b"\x8f", b"\x90", b"\x91",
]  # fmt: skip


@st.composite
def damaged_archive(draw: Draw, content: bytes) -> bytes:
    """A zip archive written again with one record's content damaged, or packed; or its bytes damaged."""
    if draw(st.integers(0, 2)) == 0:
        return draw(damaged_bytes(content))
    written = io.BytesIO()
    packed = draw(st.integers(0, 7)) == 0
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(written, "w") as new:
        names = old.namelist()
        chosen = draw(st.sampled_from([*(n for n in names if n.endswith(".pkl")), *names]))
        for name in names:
            record = old.read(name)
            if name == chosen:
                record = draw(damaged_pickle(record) if name.endswith(".pkl") else damaged_bytes(record))
            new.writestr(name, record, zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED)
    return written.getvalue()
