"""Tars as an enemy might write them."""

import io
import struct
import tarfile

import pytest

from coca.errors import BadInput
from pipelines.tar_members import TarMember, read_members


def tar(*members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.USTAR_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for info, data in members:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def plain(name: str, data: bytes, **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def read(data: bytes, cap: int = 1000) -> list[TarMember]:
    return list(read_members(io.BytesIO(data), lambda name: cap, "shard.tar"))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_plain_files_of_every_dialect(form: int) -> None:
    names = ["0.jpg", "../../etc/passwd", "ordner/ä.txt", "x" * 90 + "/" + "y" * 90 + ".json"]
    found = read(tar(*(plain(name, name.encode(), mtime=1.5) for name in names), form=form))
    assert found == [TarMember(name, name.encode()) for name in names]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_longer_than_a_header(form: int) -> None:
    name = "z" * 500 + ".jpg"
    assert read(tar(plain(name, b"a"), plain("next", b"b"), form=form)) == [
        TarMember(name, b"a"),
        TarMember("next", b"b"),
    ]


def test_links_devices_and_folders_are_passed_over() -> None:
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
    others = [plain(f"{number}.jpg", b"", type=kind, linkname="/etc/passwd") for number, kind in enumerate(kinds)]
    assert read(tar(*others, plain("a.jpg", b"a"))) == [TarMember("a.jpg", b"a")]


def test_sparse_files_are_passed_over() -> None:
    pax = tarfile.TarInfo("sparse.jpg")
    pax.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.realsize": str(2**50)}
    data = tar((pax, b"1\n0\n1\n"), plain("a.jpg", b"a"), form=tarfile.PAX_FORMAT)
    assert read(data) == [TarMember("a.jpg", b"a")]
    header = bytearray(tar(plain("old.jpg", b""))[:512])
    header[156:157], header[482] = b"S", 1
    extension = bytearray(512)
    data = with_checksum(header) + bytes(extension) + tar(plain("a.jpg", b"a"))
    assert read(data) == [TarMember("a.jpg", b"a")]


def with_checksum(header: bytearray) -> bytes:
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def test_a_member_over_its_cap_is_named_and_not_read() -> None:
    data = tar(plain("a", b"x" * 1001), plain("b", b"x" * 1000), plain("c", b"x"))
    assert [(member.name, member.data and len(member.data)) for member in read(data)] == [
        ("a", None),
        ("b", 1000),
        ("c", 1),
    ]
    assert read(data, cap=0) == []


def test_every_cut_is_found() -> None:
    whole = tar(plain("a.jpg", b"x" * 700), plain("b.txt", b"y"))
    end = 512 + 1024 + 512 + 512  # two headers and their data; then comes the end mark
    for cut in (0, 1, 511, 512, 700, 1024, 1535, 1536, 1600, 2048, 2049, end - 1, end, end + 511):
        with pytest.raises(BadInput, match=r"shard\.tar ends early at byte"):
            read(whole[:cut])
    assert len(read(whole[: end + 512])) == 2


@pytest.mark.parametrize(
    ("size", "problem"),
    [
        (b"\x80\x00\x00\x00\x7f\xff\xff\xff\xff\xff\xff\xff", None),  # 2**63: skipped as over the cap, then cut short
        (b"\xff" * 12, "has a member of -1 bytes"),
        (b"nonsense\0\0\0\0", "holds no tar header"),
    ],
)
def test_sizes_that_lie(size: bytes, problem: str | None) -> None:
    header = bytearray(tar(plain("a.jpg", b""))[:512])
    header[124:136] = size
    with pytest.raises(BadInput, match=problem or "ends early"):
        read(with_checksum(header) + bytes(4096))


def test_damaged_and_huge_headers() -> None:
    with pytest.raises(BadInput, match=r"holds no tar header \(.*\) at byte 512"):
        read(b"\x01" * 512)
    header = bytearray(tar(plain("././@PaxHeader", b"", type=tarfile.XHDTYPE))[:512])
    header[124:136] = b"%011o\0" % (1 << 30)
    with pytest.raises(BadInput, match="has an extended header of 1,073,741,824 bytes"):
        read(with_checksum(header))


@pytest.mark.parametrize("records", [b"99 path=x\n", b"0 path=x\n", b"-9 path=x\n", b"garbage", b"12 path\xff=x"])
def test_damaged_extended_records_change_nothing(records: bytes) -> None:
    extended = tar(plain("pax", records, type=tarfile.XHDTYPE))[:1024]
    assert read(extended + tar(plain("a.jpg", b"a"))) == [TarMember("a.jpg", b"a")]


def test_random_bytes_never_do_more_than_raise() -> None:
    whole = tar(plain("a.jpg", b"x" * 700, mtime=1.5), plain("z" * 300, b"y"), form=tarfile.PAX_FORMAT)
    for place in range(0, len(whole), 7):
        damaged = whole[:place] + struct.pack("B", whole[place] ^ 0xFF) + whole[place + 1 :]
        try:
            found = read(damaged)
        except BadInput:
            continue
        assert all(member.data is None or len(member.data) <= 1000 for member in found)
