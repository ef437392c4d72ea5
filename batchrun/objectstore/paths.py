"""Where a file is: here, or in an object store."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import TypeAlias
from urllib.parse import unquote

from batchrun.errors import UserError

_ALIASES = {"gcs": "gs", "abfss": "abfs"}
URL = re.compile(r"([a-z][a-z0-9+.-]+)://([^/]*)/?(.*)", re.DOTALL)
_ADVICE = {
    "s3": "credentials and address come from AWS_PROFILE, or AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL",
    "gs": "credentials come from: gcloud auth application-default login",
    "abfs": "credentials come from: az login",
    "hdfs": "Arrow needs Hadoop's libhdfs: JAVA_HOME, HADOOP_HOME, CLASSPATH",
    "hf": "credentials come from: hf auth login",
    "http": "curl -L 'URL' | batchrun submit - reads rows from any address",
}


class StoreError(UserError, OSError):
    """An object store refuses, or does not answer."""


@dataclass(frozen=True, slots=True)
class ObjectPath:
    """An object, or all objects beneath a name, with the names of pathlib's attributes.

    Args:
        url: As the user wrote it, without a `/` at its end. Nothing in it is escaped.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    @property
    def scheme(self) -> str:
        """Which kind of store it is in."""
        return self.url.partition("://")[0]

    @property
    def parts(self) -> tuple[str, ...]:
        """The bucket, and what its slashes divide the name into."""
        return tuple(part for part in self.url.partition("://")[2].split("/") if part)

    @property
    def name(self) -> str:
        """The last of its parts."""
        return self.parts[-1]

    @property
    def suffix(self) -> str:
        """The end of its name, from the last dot."""
        return PurePosixPath(self.name).suffix

    @property
    def stem(self) -> str:
        """Its name without that."""
        return PurePosixPath(self.name).stem

    @property
    def identity(self) -> str:
        """The same for all URLs of an object."""
        scheme, _, rest = self.url.partition("://")
        return f"{_ALIASES.get(scheme, scheme)}://{rest.removeprefix('anonymous@')}"

    def absolute(self) -> ObjectPath:
        """Itself."""
        return self

    def __truediv__(self, name: str) -> ObjectPath:
        return ObjectPath(f"{self.url}/{name}")


Location: TypeAlias = Path | ObjectPath  # of a file here, or in a store


def location(name: str) -> Location:
    """Where a path or URL leads; `~` is the user's home folder.

    Raises:
        StoreError: The URL names nothing, or holds a password, which would be kept with the job.
    """
    found = URL.fullmatch(name)
    if found is None:
        return Path(name).expanduser()
    scheme, host, key = found.groups()
    if scheme == "file":
        return Path("/", unquote(key))
    if not host and not key:
        raise StoreError(f"{name} names no object", "for example s3://bucket/rows.parquet")
    user, at, rest = host.rpartition("@")
    if at and ":" in user:
        raise StoreError(
            f"{scheme}://...@{rest}/{key} holds a password, which would be stored with the job",
            advice(scheme),
        )
    return ObjectPath(name.rstrip("/"))


def inside(folder: Path, name: str) -> Location:
    """Where a path or URL leads from a folder."""
    found = location(name)
    return found if isinstance(found, ObjectPath) else folder / found


def moved(path: str, old: Location | PurePath, new: Location) -> str | None:
    """A path or URL after what is in `old` has moved to `new`; None if it is not in `old`."""
    if path == str(old):
        return str(new)
    folder = f"{str(old).rstrip('/')}/"
    return str(new / path[len(folder) :]) if path.startswith(folder) else None


def advice(scheme: str) -> str | None:
    """Where a store's client gets credentials and address from, for messages."""
    scheme = _ALIASES.get(scheme, scheme)
    return next((said for kind, said in _ADVICE.items() if scheme.startswith(kind)), None)
