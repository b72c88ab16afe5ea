"""Archives that strangers could give to convert_ucf101.py, and what the message about each must contain.

    python tests/bad_archives.py FOLDER

writes one archive for each case. They are made by code, so none is kept in the repository.
"""

import bz2
import gzip
import io
import lzma
import os
import sys
import tarfile
from pathlib import Path

from hypothesis import strategies as st

VIDEO = "train/Run/v.avi"


def member(name: str, content: bytes = b"", type: bytes = tarfile.REGTYPE, link: str = "", **fields):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = type, link, len(content)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, content


def tar(*members, format=tarfile.PAX_FORMAT, **options) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format, **options) as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def block(name: str, content: bytes = b"", type: bytes = tarfile.REGTYPE, size: int | None = None) -> bytes:
    """A header that may claim any size, and the content."""
    info = tarfile.TarInfo(name)
    info.type, info.size = type, len(content) if size is None else size
    header = info.tobuf(tarfile.GNU_FORMAT) if info.size >= 0 else negative(info)
    return header[-512:] + content + bytes(-len(content) % 512)


def negative(info: tarfile.TarInfo) -> bytes:
    size, info.size = info.size, 0
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (size % 256**12).to_bytes(12, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def pax(records: bytes, type: bytes = tarfile.XHDTYPE) -> bytes:
    return block("pax", records, type)


def record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    length += len(str(length + len(str(length))))
    return b"%d %s=%s\n" % (length, key, value)


END, GOOD = bytes(1024), block(VIDEO, b"video")


def chain_of_links(victim: str) -> bytes:
    """CVE-2025-4517: links whose real path is longer than PATH_MAX get past the filter of tarfile, and a hard link
    through them reaches `victim`, a path relative to the folder in which the archive is unpacked."""
    folder, steps, path, members = "d" * 247, "abcdefghijklmnop", "", []
    for step in steps:
        members.append(member(os.path.join(path, folder), type=tarfile.DIRTYPE, mode=0o755))
        members.append(member(os.path.join(path, step), type=tarfile.SYMTYPE, link=folder))
        path = os.path.join(path, folder)
    long = os.path.join("/".join(steps), "l" * 254)
    members.append(member(long, type=tarfile.SYMTYPE, link="../" * len(steps)))
    members.append(member("out", type=tarfile.SYMTYPE, link=f"{long}/{os.path.dirname(victim)}"))
    members.append(member("file", type=tarfile.LNKTYPE, link=f"out/{os.path.basename(victim)}"))
    return tar(*members, member("file", b"overwritten\n"))


# name: (the archive, what the message holds)
NOT_SAFE = "is not safe to unpack: "
ARCHIVES = {
    # out of the folder
    "chain_of_links": (chain_of_links("../victim.txt"), "is a link: pack the files themselves"),
    "link": (tar(member("a", type=tarfile.SYMTYPE, link="../victim.txt")), f"{NOT_SAFE}a is a link"),
    "link_and_file": (
        tar(member("a", type=tarfile.SYMTYPE, link=".."), member("a/victim.txt", b"x")),
        f"{NOT_SAFE}a is a link",
    ),
    "link_inside": (tar(member(VIDEO, b"x"), member("a", type=tarfile.SYMTYPE, link=VIDEO)), "a is a link"),
    "hard_link": (tar(member("a", type=tarfile.LNKTYPE, link="../victim.txt")), f"{NOT_SAFE}a is a link"),
    "above": (tar(member("../victim.txt", b"x")), "victim.txt is not a path inside of the archive"),
    "back_and_in": (tar(member("a/../../victim.txt", b"x")), "victim.txt is not a path inside"),
    "folder_above": (tar(member("../victim.txt", type=tarfile.DIRTYPE)), "is not a path inside"),
    "absolute": (tar(member("/victim.txt", b"x")), "/victim.txt is not a path inside"),
    "absolute_by_pax": (pax(record(b"path", b"/victim.txt")) + GOOD + END, "/victim.txt is not a path inside"),
    "absolute_by_long_name": (block("l", b"/victim.txt\0", b"L") + GOOD + END, "/victim.txt is not a path inside"),
    "backslashes": (tar(member("..\\victim.txt", b"x")), "is not a path inside"),
    "drive": (tar(member("C:/victim.txt", b"x")), "C:/victim.txt is not a path inside"),
    "nul_in_name": (pax(record(b"path", b"a\0b")) + GOOD + END, "a\\x00b is not a path inside"),
    # neither files nor folders
    "pipe": (tar(member("a", type=tarfile.FIFOTYPE)), f"{NOT_SAFE}a is neither a file nor a folder"),
    "device": (tar(member("a", type=tarfile.CHRTYPE, devmajor=1, devminor=5)), "a is neither a file nor a folder"),
    "disk": (tar(member("a", type=tarfile.BLKTYPE)), "a is neither a file nor a folder"),
    "unknown_kind": (block("a", type=b"Z") + END, "a is neither a file nor a folder"),
    "several_volumes": (block("a", type=b"M") + END, "a is neither a file nor a folder"),
    "sparse": (block("a", type=b"S") + END, "a is a sparse file: pack it without --sparse"),
    "sparse_by_pax": (pax(record(b"GNU.sparse.major", b"1")) + GOOD + END, "is a sparse file"),
    # one over the other
    "twice": (tar(member(VIDEO, b"1"), member(VIDEO, b"2")), f"{NOT_SAFE}{VIDEO} is in it twice"),
    "twice_with_dots": (tar(member(VIDEO, b"1"), member("./train//Run/v.avi", b"2")), "v.avi is in it twice"),
    "in_a_file": (
        tar(member("train/a", b"1"), member("train/a/b", b"2")),
        "train/a/b is in it twice, or as a file and",
    ),
    "over_a_folder": (tar(member("train/a/b", b"1"), member("train/a", b"2")), "train/a is in it twice, or as a file"),
    "no_name": (tar(member("./", b"1", type=tarfile.CONTTYPE)), "is a file without a name"),
    # too much
    "deep": (tar(member("a/" * 1000 + "b", b"1")), "inside of more than 32 folders"),
    "long_part": (tar(member("a" * 300, b"1")), "a is too long"),
    "long_header": (block("pax", b"", tarfile.XHDTYPE, size=2**33) + END, "a header of 8,589,934,592 bytes"),
    "long_name_header": (block("l", b"", b"L", size=2**31) + END, "a header of 2,147,483,648 bytes"),
    "many_headers": (block("l", b"a\0", b"L") * 20_000 + END, "a header without its member"),
    "digits_in_header": (pax(b"1" * 2**20) + GOOD + END, "a damaged header"),
    "zeros": (gzip.compress(block("a", bytes(100 * 2**20)) + END), "unpacks to more than 0.06"),
    "zeros_bz2": (bz2.compress(block("a", bytes(100 * 2**20)) + END), "unpacks to more than 0.06"),
    "zeros_xz": (lzma.compress(block("a", bytes(100 * 2**20)) + END, preset=0), "unpacks to more than 0.06"),
    "zeros_after_the_end": (gzip.compress(GOOD + bytes(100 * 2**20)), "unpacks to more than 0.06"),
    # damaged
    "negative_size": (block("a", size=-512) + END, "a negative size"),
    "negative_header": (block("pax", type=tarfile.XHDTYPE, size=-512) + END, "a header of -512 bytes"),
    "absurd_size": (block("a", b"x", size=2**60) + END, "it is cut off"),
    "absurd_size_by_pax": (pax(record(b"size", b"9" * 5000)) + GOOD + END, "can't be unpacked"),
    "wrong_length": (pax(b"99 path=a\n") + GOOD + END, "a damaged header"),
    "no_length": (pax(b"0 path=a\n") + GOOD + END, "a damaged header"),
    "one_name_for_all": (pax(record(b"path", b"a"), tarfile.XGLTYPE) + GOOD + END, "gives all members one name"),
    "cut_in_a_header": (tar(member(VIDEO, b"x"))[:100], "it is cut off"),
    "cut_in_a_file": (GOOD[:514], "it is cut off"),
    "cut_between_files": (GOOD + block("train/Run/w.avi", b"x"), "it is cut off"),
    "two_in_one": ((GOOD + END) * 2, "data after its end"),
    "zip": (b"PK\3\4" + bytes(range(256)) * 4, "can't be unpacked"),
    "rar": (b"Rar!\x1a\7\1\0" + bytes(range(256)) * 4, "can't be unpacked"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(range(256)) * 4, "can't be unpacked"),
    "gzip_of_nothing": (gzip.compress(b""), "it is cut off"),
    "damaged_gzip": (gzip.compress(GOOD + END)[:-8] + b"12345678", "can't be unpacked"),
    "damaged_xz": (lzma.compress(GOOD + END)[:-20], "can't be unpacked"),
    "damaged_bz2": (bz2.compress(GOOD + END)[:-20], "can't be unpacked"),
}

LONG = f"train/{'Class' * 30}/{'v' * 120}é.avi"
GIT_HEADER = pax(record(b"comment", b"0123456789abcdef"), tarfile.XGLTYPE)
MAC_HEADER = pax(record(b"mtime", b"1.5") + record(b"LIBARCHIVE.xattr.com.apple.quarantine", b"A" * 9000))
# name: (the archive, the files that it holds)
GOOD_ARCHIVES = {
    "ustar": (tar(member(VIDEO, b"1"), member("test/A/b", b"2"), format=tarfile.USTAR_FORMAT), [VIDEO, "test/A/b"]),
    "gnu": (tar(member(VIDEO, b"1"), member(LONG, b"2" * 2000), format=tarfile.GNU_FORMAT), [VIDEO, LONG]),
    "pax": (tar(member(LONG, b"1"), member(VIDEO, b"2")), [LONG, VIDEO]),
    "gzip": (gzip.compress(GOOD + END), [VIDEO]),
    "bz2": (bz2.compress(GOOD + END), [VIDEO]),
    "xz": (lzma.compress(GOOD + END), [VIDEO]),
    "lzma": (lzma.compress(GOOD + END, lzma.FORMAT_ALONE), [VIDEO]),
    "two_gzip_streams": (gzip.compress(GOOD) + gzip.compress(END), [VIDEO]),
    "of_git": (GIT_HEADER + GOOD + END, [VIDEO]),
    "of_a_mac": (MAC_HEADER + GOOD + END, [VIDEO]),
    "dots": (tar(member("./", type=tarfile.DIRTYPE), member(f"./{VIDEO}", b"1")), [VIDEO]),
    "folder_after_its_file": (tar(member(VIDEO, b"1"), member("train/Run/", type=tarfile.DIRTYPE, mode=0)), [VIDEO]),
    "empty": (END, []),
    "padded": (GOOD + bytes(20 * 512), [VIDEO]),
    "size_by_pax": (pax(record(b"size", b"5")) + block(VIDEO, size=0) + b"video" + bytes(507) + END, [VIDEO]),
    "not_utf_8": (block("l", b"train/Run/\xff\0", b"L") + block("a", b"x") + END, ["train/Run/\udcff"]),
}


def many_empty_files(n: int) -> bytes:
    return gzip.compress(b"".join(block(f"train/A/v{i}.avi") for i in range(n)) + END, 1)


# ---- Random archives, for hypothesis

NAMES = st.lists(
    st.sampled_from(["..", ".", "", "a", "A", "train", "victim.txt", "\\", "C:", "a" * 300, "\udcff", "é", "\n"]),
    max_size=6,
).map("/".join)
TYPES = st.sampled_from([bytes([kind]) for kind in b"0000000\x0055123467SLKVMXxgDNA"])
LINKS = st.sampled_from(["", "..", "../victim.txt", "a", "train", "/etc/passwd"])
MEMBERS = st.builds(
    lambda name, content, type, link: member(name, content, type, link), NAMES, st.binary(max_size=600), TYPES, LINKS
)
FLIPS = st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=6)


@st.composite
def random_archives(draw) -> bytes:
    """Members of all kinds, of which some bytes are then changed."""
    format = draw(st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
    content = bytearray(tar(*draw(st.lists(MEMBERS, max_size=6)), format=format, errors="surrogateescape"))
    for at, value in draw(FLIPS):
        content[at % len(content)] = value
    for at in range(0, len(content) - 511, 512) if draw(st.booleans()) else ():  # checksums that fit the changes
        if content[at + 257 : at + 262] == b"ustar":
            content[at + 148 : at + 156] = b" " * 8
            content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + 512])
    return bytes(content)


def main():
    folder = Path(sys.argv[1])
    for name, (content, _) in ARCHIVES.items():
        (folder / f"{name}.tar").write_bytes(content)
    print(f"{len(ARCHIVES)} archives")


if __name__ == "__main__":
    main()
