"""Compiled code is loaded from where nobody else can have put it, and from nowhere else."""

import ctypes
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from batchrun.engine.cpu import attention
from batchrun.engine.cpu import compile as compiled
from batchrun.engine.cpu import library as structs
from batchrun.trust import who_else

OTHER = 4321  # a user who is somebody else
SOURCE = 'extern "C" int answer() { return 42; }\n'
PLANTED = 'extern "C" int answer() { return 666; }\n'
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


@pytest.fixture
def place():
    """A folder that nobody else could have changed, in a sticky one."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(os.path.realpath(folder))


@pytest.fixture
def source(place):
    path = place / "answer.cpp"
    path.write_text(SOURCE)
    return path


@pytest.fixture
def library(place, source, monkeypatch):
    """The source, compiled into the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    path = compiled.build(source)
    assert path.parent == place / "cache" / "batchrun"
    return path


@pytest.fixture(scope="session")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    (folder / "planted.cpp").write_text(PLANTED)
    command = ["g++", "-shared", "-fPIC", folder / "planted.cpp", "-o", folder / "planted.so"]
    subprocess.run(command, check=True)
    return folder / "planted.so"


def put(planted, library, mode=0o755, owner=None):
    library.unlink()
    shutil.copy(planted, library)
    library.chmod(mode)
    if owner is not None:
        os.chown(library, owner, owner)


def test_what_is_compiled_is_private_and_kept(library, source):
    assert [oct(p.stat().st_mode & 0o777) for p in (library, library.parent)] == ["0o700"] * 2
    lines = []
    assert compiled.load(source, lines.append).answer() == 42
    assert lines == []


@pytest.mark.parametrize("mode", [0o777, 0o757])
def test_a_library_that_others_can_write_is_compiled_again(library, source, planted, mode):
    library.parent.chmod(0o755)
    put(planted, library, mode)
    lines = []
    assert compiled.load(source, lines.append).answer() == 42
    assert len(lines) == 1


@root_only
def test_a_library_of_somebody_else_is_compiled_again(library, source, planted):
    put(planted, library, owner=OTHER)
    assert compiled.load(source).answer() == 42
    assert library.stat().st_uid == os.geteuid()


def test_a_library_that_is_a_link_is_compiled_again(library, source, planted):
    library.unlink()
    library.symlink_to(planted)
    assert compiled.load(source).answer() == 42


@pytest.mark.parametrize("which", ["batchrun", "cache"])
def test_a_cache_that_others_can_write_is_not_used(library, source, planted, place, which):
    put(planted, library)
    library.parent.chmod(0o755)
    folder = {"batchrun": library.parent, "cache": place / "cache"}[which]
    folder.chmod(0o777)
    lines = []
    assert compiled.load(source, lines.append).answer() == 42
    assert f"others can write to {folder}" in lines[0]
    assert compiled.build(source).parent != library.parent


@root_only
def test_a_cache_of_somebody_else_is_not_used(library, source, planted):
    put(planted, library)
    os.chown(library.parent, OTHER, OTHER)
    assert compiled.load(source).answer() == 42


def test_what_nobody_can_get_to_may_be_open(place):
    """Many systems make folders that a user's own group can write, in a home that is shut."""
    inner = place / "shut" / "open"
    inner.mkdir(parents=True)
    inner.chmod(0o777)
    assert who_else(inner) == f"others can write to {inner}"
    (place / "shut").chmod(0o700)
    assert who_else(inner) is None


def test_a_sticky_folder_is_as_good_as_one_of_ones_own(place):
    inner = place / "public" / "mine"
    inner.mkdir(parents=True)
    (place / "public").chmod(0o1777)
    assert who_else(inner) is None
    (place / "public").chmod(0o777)
    assert who_else(inner) == f"others can write to {place / 'public'}"


@root_only
def test_a_name_in_tmp_that_somebody_else_took_first_is_not_used(place, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    place.chmod(0o1777)
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.setenv("USER", "me")
    monkeypatch.setenv("LOGNAME", "me")
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "FLASHINFER_WORKSPACE_BASE"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    compiled.guard_caches()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ  # it is ours now, and stays where it was
    taken = place / "torchinductor_me"
    os.chown(taken, OTHER, OTHER)
    lines = []
    compiled.guard_caches(lines.append)
    assert lines == [f"{taken} belongs to user {OTHER}: compiled code is not kept there"]
    used = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert who_else(used) is None
    assert used.stat().st_mode & 0o777 == 0o700
    assert "TRITON_CACHE_DIR" not in os.environ


def nobody(*_):
    raise KeyError("getpwuid(): uid not found")


def test_a_user_without_a_name_or_a_home_is_told_what_to_set(source, monkeypatch):
    for name in ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    compiled.guard_caches()
    assert not Path("~").exists()
    with pytest.raises(compiled.CompileError, match="set HOME or XDG_CACHE_HOME"):
        compiled.load(source)


def test_a_header_beside_a_source_is_part_of_it(library, source):
    source.with_name("common.h").write_text("// another constant\n")
    assert compiled.build(source) != library


class Given(ctypes.Structure):
    _fields_ = (("a", ctypes.c_int64), ("b", ctypes.c_void_p))


@pytest.mark.parametrize(("size", "same"), [(16, True), (24, False)])
def test_a_struct_has_the_size_that_the_source_gives_it(library, source, size, same):
    export = f'extern "C" long batchrun_sizeof_Given() {{ return {size}; }}\n'
    source.write_text(SOURCE + export)
    if same:
        assert compiled.load(source, structs=[Given]).answer() == 42
    else:
        with pytest.raises(AssertionError, match=r"answer\.cpp has another Given"):
            compiled.load(source, structs=[Given])


def members(source: Path, struct: str) -> list[tuple[str, type]]:
    """Names and ctypes of a C++ struct's members, in the order of their declarations."""
    text = re.sub(r"//.*", "", source.read_text(encoding="utf-8"))
    body = re.search(rf"struct {struct} {{(.*?)\n}};", text, re.DOTALL)
    assert body is not None, struct
    found: list[tuple[str, type]] = []
    for declaration in filter(None, map(str.strip, body[1].split(";"))):
        kind, names = re.fullmatch(r"(?:const )?(\w+)(.*)", declaration, re.DOTALL).groups()
        for name in names.split(","):
            pointer, word, count = re.fullmatch(r"\s*(\*?)\s*(\w+)(?:\[(\d)\])?\s*", name).groups()
            made: type = ctypes.c_void_p if pointer else C_TYPES[kind]
            found.append((word, made * int(count) if count else made))
    return found


C_TYPES = {
    "int64_t": ctypes.c_int64,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
    "Matrix": structs.Matrix,
}


@pytest.mark.parametrize(
    ("source", "struct", "ours"),
    [
        ("common.h", "Call", attention.Call),
        ("layers.h", "Matrix", structs.Matrix),
        ("layers.h", "Linear", structs.Linear),
        ("layers.h", "Project", structs.Project),
        ("layers.h", "Finish", structs.Finish),
        ("layers.h", "Norm", structs.Norm),
    ],
)
def test_what_is_handed_over_has_the_same_members(source, struct, ours):
    """In the same order: two of one size that change places would compile as well."""
    assert [*ours._fields_] == members(Path(attention.__file__).with_name(source), struct)
