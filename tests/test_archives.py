"""Archives: what is whole comes out as it went in; whatever would land elsewhere, lie or grow is refused and gone."""

import bz2
import gzip
import io
import lzma
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynadapter.cli import main
from dynadapter.data import archives
from dynadapter.data.archives import BadArchive, Extracted, extract

FILES = {
    "set/train/a/0.png": np.random.default_rng(0).bytes(3000),
    "set/train/b ü/1.png": b"x" * 20_000,
    "set/test/empty": b"",
    "set/a rather long path " + "n" * 120 + "/2.png": b"2",
}
FORMATS = {
    ".tar": lambda data: data,
    ".tar.gz": gzip.compress,
    ".tgz": gzip.compress,
    ".tar.bz2": bz2.compress,
    ".tar.xz": lzma.compress,
}


def member(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, **more: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    for key, value in more.items():
        setattr(info, key, value)
    return info


def tarred(*members: tuple[tarfile.TarInfo, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def zipped(*members: tuple[str | zipfile.ZipInfo, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return stream.getvalue()


def plain_tar(files: dict[str, bytes] = FILES, **options: Any) -> bytes:
    return tarred(*((member(name, size=len(content)), content) for name, content in files.items()), **options)


def content_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def refused(path: Path, words: str, **limits: Any) -> None:
    """Nothing of the archive is left, nor anything beside it, and the reason is one line with its path."""
    before = sorted(path.parent.parent.rglob("*"))
    with pytest.raises(BadArchive) as error:
        extract(path, path.parent / "out", **limits)
    assert words in str(error.value)
    assert str(error.value).startswith(f"{path} ")
    assert "\n" not in str(error.value)
    assert sorted(path.parent.parent.rglob("*")) == before


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "inside").mkdir()
    return tmp_path / "inside"


def save(place: Path, name: str, content: bytes) -> Path:
    (place / name).write_bytes(content)
    return place / name


# ---- what is whole


@pytest.mark.parametrize("suffix", [*FORMATS, ".zip"])
def test_what_goes_in_comes_out(suffix, place):
    data = zipped(*FILES.items()) if suffix == ".zip" else FORMATS[suffix](plain_tar())
    seen: list[tuple[int, int]] = []
    done = extract(save(place, f"a{suffix}", data), place / "new" / "out", progress=lambda *step: seen.append(step))
    assert content_of(place / "new" / "out") == FILES
    assert done == Extracted(place / "new" / "out", len(FILES), sum(map(len, FILES.values())))
    assert all(0 <= read <= whole == len(data) for read, whole in seen)
    assert [read for read, _ in seen] == sorted(read for read, _ in seen)
    assert sorted(path.name for path in place.iterdir()) == sorted([f"a{suffix}", "new"])


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_layout_of_tar(format, place):
    files = {name: content for name, content in FILES.items() if format != tarfile.USTAR_FORMAT or name.isascii()}
    extract(save(place, "a.tar", plain_tar(files, format=format)), place / "out")
    assert content_of(place / "out") == files


def test_several_streams_and_zeros_behind_them(place):
    data = plain_tar()
    for suffix, pack in list(FORMATS.items())[1:]:
        extract(save(place, f"a{suffix}", pack(data[:5000]) + pack(data[5000:]) + bytes(1024)), place / suffix[1:])
        assert content_of(place / suffix[1:]) == FILES


def test_rights_and_owners_are_not_taken_over(place):
    info = member("tool", size=1, mode=0o6777, uid=0, uname="root")
    extract(save(place, "a.tar", tarred((info, b"x"), (member("d", tarfile.DIRTYPE, mode=0), b""))), place / "out")
    mode = stat.S_IMODE((place / "out" / "tool").stat().st_mode)
    assert mode == 0o644 & ~current_umask()
    assert os.access(place / "out" / "d", os.W_OK | os.X_OK)


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# ---- what would land elsewhere

OUTSIDE = ["../x", "a/../../x", "/x", "/", "C:/x", "c:x", "..", "a\\..\\x", "a\nb", "a\x7f"]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("kind", [".tar", ".zip"])
def test_members_outside(name, kind, place):
    data = tarred((member(name, size=1), b"x")) if kind == ".tar" else zipped((zipfile.ZipInfo(name), b"x"))
    refused(save(place, f"a{kind}", data), "has a ")


def test_a_name_that_goes_on_behind_a_zero(place):
    data = zipped(("ok.pngX../evil", b"x")).replace(b"ok.pngX../evil", b"ok.png\0../evil")
    refused(save(place, "a.zip", data), "control character")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE])
def test_links_and_devices_in_a_tar(kind, place):
    """Also where the link stays inside: the next member could be written through it."""
    for target in ("/etc/passwd", "a.png"):
        link = member("link", kind, linkname=target)
        data = tarred((member("a.png", size=1), b"x"), (link, b""), (member("link/b", size=1), b"x"))
        refused(save(place, "a.tar", data), "a link, a device or has holes: 'link'")


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFSOCK])
def test_links_and_devices_in_a_zip(kind, place):
    info = zipfile.ZipInfo("link")
    info.external_attr = (kind | 0o777) << 16
    refused(save(place, "a.zip", zipped((info, b"/etc/passwd"))), "has a member that is a link or a device: 'link'")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("a.png", "a.png"), "two members with the name 'a.png'"),
        (("a.png", "A.PNG"), "differ in spelling only: 'a.png' and 'A.PNG'"),
        (("é.png", "e\u0301.png"), "differ in spelling only"),
        (("a/b", "A/c"), "differ in spelling only: 'a' and 'A'"),
        (("a", "a/b"), "two members with the name 'a'"),
        (("a/b", "a"), "two members with the name 'a'"),
        (("x/" * 70 + "a",), "71 folders deep"),
    ],
)
def test_names_that_do_not_go_together(names, words, place):
    refused(save(place, "a.tar", tarred(*((member(name, size=1), b"x") for name in names))), words)


def test_a_folder_may_stand_there_twice(place):
    folder = (member("a", tarfile.DIRTYPE), b"")
    extract(save(place, "a.tar", tarred(folder, (member("a/b", size=1), b"x"), folder)), place / "out")
    assert content_of(place / "out") == {"a/b": b"x"}


def test_nothing_is_written_through_a_folder_that_is_a_link(place):
    """Where the folder is to be, another process has put a link."""
    (place / "elsewhere").mkdir()
    (place / "out.partial").symlink_to(place / "elsewhere")
    with pytest.raises(ValueError, match=r"out\.partial exists: an extraction is going on or was cut off"):
        extract(save(place, "a.tar", plain_tar()), place / "out")
    assert not any((place / "elsewhere").iterdir())


# ---- bombs


@pytest.mark.parametrize("suffix", [".tar.gz", ".tar.bz2", ".tar.xz", ".zip"])
def test_a_bomb(suffix, place, monkeypatch):
    monkeypatch.setattr(archives, "SMALL", 2**20)
    files = {f"{k}": bytes(2**20) for k in range(8)}
    data = zipped(*files.items()) if suffix == ".zip" else FORMATS[suffix](plain_tar(files))
    path = save(place, f"a{suffix}", data)
    refused(path, "unpacks to more than 1,", max_ratio=10)
    refused(
        path,
        "unpacks to more than 3,000,000 bytes; if it is to be trusted, raise max_bytes",
        max_bytes=3 * 10**6,
        max_ratio=1e5,
    )
    refused(path, "holds more than 5 files and folders", max_files=5, max_ratio=1e5)
    extract(path, place / "trusted", max_ratio=1e5)


def test_a_bomb_that_lies_about_its_size(place, monkeypatch):
    """The directory says one byte; what comes out is counted, not what is said."""
    monkeypatch.setattr(archives, "SMALL", 2**16)
    data = zipped(("bomb", bytes(2**22)))
    lie = data.replace(struct.pack("<L", 2**22), struct.pack("<L", 1))
    assert lie != data
    refused(save(place, "a.zip", lie), "is damaged or cut short")


def test_headers_without_end(place):
    long = member("x" * (archives.HEADERS + 1))
    refused(save(place, "a.tar", tarred((long, b""), format=tarfile.GNU_FORMAT)), "header is absurdly long")


def test_a_bomb_of_nothing(place, monkeypatch):
    """Gigabytes of zeros behind the end, as small as a page when compressed."""
    monkeypatch.setattr(archives, "SMALL", 2**20)
    path = save(place, "a.tar.gz", gzip.compress(plain_tar() + bytes(2**23)))
    refused(path, "goes on for more than 1,048,576 bytes after its end")


def test_a_full_disk_is_said_before_it_is_full(place, monkeypatch):
    usage = type("Usage", (), {"free": archives.SPARE + 100})
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda path: usage)
    refused(save(place, "a.tar", plain_tar()), "does not fit on the disk")


# ---- damage


@pytest.mark.parametrize("suffix", [*FORMATS, ".zip"])
def test_damage_is_refused_or_changes_nothing(suffix, place):
    data = zipped(*FILES.items()) if suffix == ".zip" else FORMATS[suffix](plain_tar())
    rng = np.random.default_rng(1)
    path = place / f"a{suffix}"
    refusals = 0
    for trial in range(60):
        if trial < 30:
            damaged = data[: rng.integers(len(data))]
        else:
            damaged = bytearray(data)
            damaged[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            extract(path, place / "out")
        except BadArchive:
            refusals += 1
        else:
            out = content_of(place / "out")
            if suffix != ".tar":  # which has no checksum of its content
                assert out == FILES
            for file in sorted((place / "out").rglob("*"), reverse=True):
                file.rmdir() if file.is_dir() else file.unlink()
            (place / "out").rmdir()
        assert [p.name for p in place.iterdir()] == [path.name]
    assert refusals >= 30


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.zip", b"", "is damaged or cut short"),
        ("a.tar", b"", "is damaged or cut short"),
        ("a.tar.gz", b"", "is damaged or cut short"),
        ("a.tar.gz", b"no gzip", "is damaged or cut short"),
        ("a.tar", b"x" * 2000, "is damaged or cut short"),
        ("a.tar", plain_tar({"a": b"x"})[:1024], "is cut short: its end is missing"),
        ("a.tar", plain_tar() + plain_tar(), "holds something after its end"),
        ("a.zip", zipped(), "holds no file"),
        ("a.tar", tarred((member("d", tarfile.DIRTYPE), b"")), "holds no file"),
    ],
)
def test_what_is_no_archive(name, content, words, place):
    refused(save(place, name, content), words)


def test_an_encrypted_archive(place):
    data = bytearray(zipped(("a.png", b"x")))
    data[data.index(b"PK\1\2") + 8] |= 1
    refused(save(place, "a.zip", bytes(data)), "is encrypted; decrypt it first")


def test_an_error_that_is_not_the_archives(place, monkeypatch):
    path = save(place, "a.tar", plain_tar())
    monkeypatch.setattr(archives._Writer, "write_file", lambda *args: os.stat("/nowhere/at/all"))
    with pytest.raises(FileNotFoundError):
        extract(path, place / "out")
    assert [p.name for p in place.iterdir()] == ["a.tar"]


def test_stopped_in_the_middle_nothing_is_left(place):
    def stop(read: int, whole: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(save(place, "a.tar", plain_tar()), place / "out", progress=stop)
    assert [p.name for p in place.iterdir()] == ["a.tar"]


# ---- mistakes


@pytest.mark.parametrize(
    ("limits", "name", "words"),
    [
        ({"max_bytes": 0}, "a.tar", "max_bytes must be above 0, not 0"),
        ({"max_files": -1}, "a.tar", "max_files must be above 0"),
        ({"max_ratio": float("nan")}, "a.tar", "max_ratio must be above 0"),
        ({}, "a.rar", "a.rar is no archive by its name; expected one ending in .zip, .tar,"),
    ],
)
def test_mistakes(limits, name, words, place):
    with pytest.raises(ValueError, match=words) as error:
        extract(save(place, name, plain_tar()), place / "out", **limits)
    assert not isinstance(error.value, BadArchive)


def test_a_folder_that_is_there_stays(place):
    path = save(place, "a.tar", plain_tar())
    (place / "out").mkdir()
    with pytest.raises(ValueError, match="out exists; give a folder that does not"):
        extract(path, place / "out")
    with pytest.raises(ValueError, match="is no name for a new folder"):
        extract(path, "/")
    with pytest.raises(IsADirectoryError):
        extract(save_folder(place / "b.zip"), place / "new")
    os.mkfifo(place / "c.zip")
    with pytest.raises(OSError, match="a pipe, a socket or a device"):
        extract(place / "c.zip", place / "new")


def save_folder(path: Path) -> Path:
    path.mkdir()
    return path


# ---- the command


def test_unpack(place, capsys):
    files = {f"tasks/toys/{name}": content for name, content in {"train800.txt": b"a 0", "a": b"b"}.items()}
    path = save(place, "set.tar.gz", gzip.compress(plain_tar(files)))
    main(["unpack", str(path), "--out", str(place / "new")])
    said = capsys.readouterr().out.splitlines()
    root = place / "new" / "tasks"
    assert said == [
        f"2 files, 0.0 MB, in {place / 'new'}",
        f"check them: dynadapter verify --data VTAB1k --data.root {root}",
    ]
    assert content_of(place / "new") == files
    path = save(place, "set.zip", zipped(("train/cat/1.png", b"x")))
    main(["unpack", "--archive", str(path), f"--out={place / 'more new'}", "--max_bytes=1.5GB", "--max_ratio", "300"])
    assert f"--data ImageFolder --data.root '{place / 'more new'}'" in capsys.readouterr().out


UNPACK = [
    ("", "archive and out must be given"),
    ("{A}", "out must be given"),
    ("nowhere.zip --out {N}", "there is no archive 'nowhere.zip'; give the file"),
    ("{D} --out {N}", "is a folder, there is nothing to unpack"),
    ("{A} --ot {N}", "there is no key 'ot'; did you mean 'out'?"),
    ("{A} --out", "--out needs a value"),
    ("{A} --out {D}", "exists; give a folder that does not"),
    ("{A} --out {N} --max_bytes 1XB", "max_bytes: expected bytes such as 20GB or 500MB, not '1XB'"),
    ("{A} --out {N} --max_bytes 10", "unpacks to more than 10 bytes"),
    ("{A} --out {N} --max_files 0", "max_files=0 must be above 0"),
    ("{A} --out {N} --max_files many", "max_files: expected a whole number, not 'many'"),
    ("{A} --out {N} --max_ratio nan", "max_ratio: expected a number, not 'nan'"),
    ("{A} --out {N} --max_file 3", "there is no key 'max_file'; did you mean 'max_files'?"),
    ("{T} --out {N}", "is no archive by its name"),
    ("{B} --out {N}", "is damaged or cut short"),
]


@pytest.mark.parametrize(("args", "words"), UNPACK)
def test_a_mistake_is_one_line(args, words, place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    save(place, "a.zip", zipped(("a.png", b"x" * 99)))
    save(place, "b.zip", b"no zip")
    save(place, "t.txt", b"text")
    (place / "there").mkdir()
    for key, name in {"A": "a.zip", "B": "b.zip", "T": "t.txt", "D": "there", "N": "new"}.items():
        args = args.replace(f"{{{key}}}", name)
    with pytest.raises(SystemExit) as ending:
        main(["unpack", *args.split()])
    (line,) = capsys.readouterr().err.splitlines()
    assert ending.value.code == 2
    assert line.startswith("dynadapter: error: ")
    assert words in line
    assert not (place / "new").exists()


def test_checksums_of_gzip_are_looked_at(place):
    """Python's own reader would take what zlib gives and never see the end of the stream."""
    data = bytearray(gzip.compress(plain_tar()))
    assert struct.unpack("<L", data[-8:-4])[0] == zlib.crc32(plain_tar())
    data[-6] ^= 1
    refused(save(place, "a.tar.gz", bytes(data)), "is damaged or cut short")
