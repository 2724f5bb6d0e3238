"""Where users' PDFs are: files, folders, archives, Debian packages -> a list of documents that can be opened.

Archives are read member by member, never unpacked by the paths in them: a PDF goes to a numbered file in a folder of
ours, links and devices are passed over, and what an archive may grow to is bounded.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count as count_from
from pathlib import Path
from typing import BinaryIO

import pypdfium2 as pdfium
import pypdfium2.raw as pdfium_c

from .guarded import Failure, run_guarded, why
from .pdf import PAGE_LICENSE
from .refusals import Refusals
from .sources import DEB_NAME, fetch_deb

MAX_FILE = 1 << 30  # bytes of a PDF. Ours
MAX_PAGES = 20_000  # of a PDF. Ours
MAX_MEMBERS = 1_000_000  # of an archive. Ours
MAX_HEADER = 1 << 20  # bytes of a name or extended header in a tar archive. Ours
MAX_GROWTH = 200  # times its own size that an archive may unpack to; PDFs grow by little, text by ten or so. Ours
FREE_GROWTH = 1 << 30  # bytes that an archive may unpack to whatever its size. Ours
OPEN_SECONDS = 60.0
UNREADABLE = (OSError, EOFError, ValueError, RuntimeError, NotImplementedError, zlib.error, lzma.LZMAError)


@dataclass(frozen=True)
class Document:
    """A PDF file.

    ``origin`` is the source as the user named it (what refusals are counted by), ``name`` what the rows' source
    column begins with, ``path`` where the file is, ``license`` what is known of it.
    """

    origin: str
    name: str
    path: Path
    pages: int = 0
    license: str = "unknown"


def find_documents(
    sources: list[str], staging: Path, refusals: Refusals, *, source_name: str | None = None
) -> Iterator[Document]:
    """All PDFs of ``sources``, in a fixed order, not yet opened.

    Args:
        sources: each a PDF, a folder (searched below, whatever the case of ``.pdf``), a zip or tar archive (also
            compressed by gzip, bzip2 or xz), or the name of a Debian package.
        staging: an empty folder for what archives hold.
        refusals: told of archives that break off and members that cannot be had.
        source_name: what rows are said to come from instead of the name of the file, folder or package.

    Raises:
        ValueError: a source is none of these.
        RuntimeError: a Debian package cannot be fetched.
    """
    for source in sources:
        path = Path(source).expanduser()
        label = source_name or path.name or path.resolve().name or source
        if path.is_dir():
            found = (entry for entry in path.rglob("*") if entry.suffix.lower() == ".pdf" and entry.is_file())
            for entry in sorted(found):
                yield Document(source, f"{label}/{entry.relative_to(path).as_posix()}", entry)
        elif path.is_file():
            if _is_pdf(path):
                yield Document(source, f"{source_name}/{path.name}" if source_name else path.name, path)
            elif zipfile.is_zipfile(path):
                yield from _members(source, label, _of_zip(path), staging, path.stat().st_size, refusals)
            elif _is_tar(path):
                yield from _members(source, label, _of_tar(path), staging, path.stat().st_size, refusals)
            else:
                raise ValueError(f"{source} is no PDF, zip or tar file (gzip, bzip2 and xz are understood)")
        elif DEB_NAME.match(source) and "." not in source:
            try:
                tree = fetch_deb(source)
            except RuntimeError as error:
                raise RuntimeError(f"there is no file or folder {source}, and as a Debian package: {error}") from error
            known = PAGE_LICENSE if source.startswith("texlive-") else "as its Debian package"
            for entry in sorted(tree.rglob("*.pdf")):
                if entry.is_file() and not entry.is_symlink():
                    name = f"{source_name or source}/{entry.relative_to(tree).as_posix()}"
                    yield Document(source, name, entry, license=known)
        else:
            raise ValueError(f"there is no file or folder {source}, and that is not the name of a Debian package")


def _is_pdf(path: Path) -> bool:
    with path.open("rb") as file:
        return path.suffix.lower() == ".pdf" or file.read(1024).lstrip().startswith(b"%PDF-")


def _is_tar(path: Path) -> bool:
    try:
        with tarfile.open(path, "r|*", tarinfo=_TarInfo) as archive:
            return archive.next() is not None
    except (tarfile.TarError, *UNREADABLE):
        return False


class _TarInfo(tarfile.TarInfo):
    """A member whose long name or extended header, which tarfile reads into memory, is no larger than `MAX_HEADER`."""

    def _proc_member(self, archive):
        extended = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
        if self.type in (*extended, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK) and self.size > MAX_HEADER:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        return super()._proc_member(archive)


# A member of an archive: its name, its size as far as the archive says, and how to open it; None for what is passed.
Member = tuple[str, int, Callable[[], BinaryIO | None] | None]


def _of_zip(path: Path) -> Iterator[Member]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            wanted = not info.is_dir() and info.filename.lower().endswith(".pdf")
            # A member that is not wanted is not unpacked, so its size is no matter.
            yield info.filename, info.file_size if wanted else 0, (lambda i=info: archive.open(i)) if wanted else None


def _of_tar(path: Path) -> Iterator[Member]:
    # "r|*" reads the archive once from the front: what is passed over is unpacked too, and counts.
    with tarfile.open(path, "r|*", tarinfo=_TarInfo) as archive:
        for info in archive:
            wanted = info.isreg() and info.name.lower().endswith(".pdf")
            yield info.name, info.size, (lambda i=info: archive.extractfile(i)) if wanted else None


def _members(
    source: str,
    label: str,
    members: Iterator[Member],
    staging: Path,
    size: int,
    refusals: Refusals,
) -> Iterator[Document]:
    """Copy the PDFs of an archive to ``staging``, one by one, until one of the bounds is reached."""
    limit = max(FREE_GROWTH, MAX_GROWTH * size)
    numbers = count_from(len(list(staging.iterdir())))
    grown = count = 0
    try:
        for name, claimed, opener in members:
            count += 1
            if count > MAX_MEMBERS:
                refusals.add(source, f"archive: more than {MAX_MEMBERS} members, the rest left out")
                return
            if grown + claimed > limit:
                refusals.add(source, f"archive: grows beyond {MAX_GROWTH} times its size, the rest left out", name)
                return
            if opener is None:
                grown += claimed
                continue
            if claimed > MAX_FILE:
                refusals.add(source, f"document: larger than {MAX_FILE >> 20} MiB", name)
                grown += claimed
                continue
            target = staging / f"{next(numbers):07d}.pdf"
            try:
                grown += max(claimed, _copy(opener(), target, min(MAX_FILE, limit - grown)))
            except zipfile.BadZipFile as error:
                target.unlink(missing_ok=True)
                refusals.add(source, "archive: a member is damaged", f"{name}: {error}")
                continue
            except RuntimeError as error:  # a password, in zipfile's words
                target.unlink(missing_ok=True)
                refusals.add(source, "archive: a member is encrypted", f"{name}: {error}")
                continue
            yield Document(source, f"{label}/{_plain(name)}", target)
    except (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, *UNREADABLE) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk, not the archive
            raise
        refusals.add(source, "archive: breaks off, the rest left out", str(error))


def _copy(file: BinaryIO | None, target: Path, limit: int) -> int:
    """Write ``file`` to ``target``; at most ``limit`` bytes whatever the archive claims."""
    written = 0
    with file, target.open("wb") as out:
        while block := file.read(1 << 20):
            written += len(block)
            if written > limit:
                raise zipfile.BadZipFile("larger than the archive says or than is allowed")
            out.write(block)
    return written


def _plain(name: str) -> str:
    """A member's name without tricks, for the source column: it is never used as a path."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    return "".join(character if character.isprintable() else "?" for character in "/".join(parts))[-300:]


def check_document(document: Document) -> tuple[str, int] | Failure:
    """Open a PDF: a digest of its content and its pages, or why it cannot be used. To be called in a worker."""
    size = document.path.stat().st_size
    if size > MAX_FILE:
        return Failure("refused", f"larger than {MAX_FILE >> 20} MiB")
    content = document.path.read_bytes()
    try:
        opened = pdfium.PdfDocument(content)
    except pdfium.PdfiumError as error:
        # pdfium keeps an error from before for a file without pages, so its word alone does not do.
        secured = error.err_code in (pdfium_c.FPDF_ERR_PASSWORD, pdfium_c.FPDF_ERR_SECURITY)
        encrypted = secured and b"/Encrypt" in content
        return Failure("refused", "encrypted" if encrypted else "corrupt or without pages")
    try:
        pages = len(opened)
    finally:
        opened.close()
    if pages < 1:
        return Failure("refused", "corrupt or without pages")
    if pages > MAX_PAGES:
        return Failure("refused", f"more than {MAX_PAGES} pages")
    return hashlib.blake2b(content, digest_size=16).hexdigest(), pages


def open_documents(
    found: Iterator[Document], refusals: Refusals, *, workers: int = 1, progress: bool = True
) -> tuple[list[Document], int]:
    """Those of ``found`` that can be used, each with its pages, and how many were left out as copies of others.

    Raises:
        ValueError: there are none; the message says why.
    """
    from tqdm import tqdm

    usable: list[Document] = []
    seen: set[str] = set()
    copies = 0
    checks = run_guarded(check_document, found, workers=workers, seconds=lambda document: OPEN_SECONDS)
    for document, result in tqdm(checks, desc="documents", unit=" documents", disable=not progress):
        if isinstance(result, Failure):
            reason, detail = why(result)
            refusals.add(document.origin, f"document: {reason}", f"{document.name}{detail and ': '}{detail}")
            continue
        digest, pages = result
        refusals.accept(document.origin)
        if digest in seen:
            copies += 1
            continue
        seen.add(digest)
        usable.append(replace(document, pages=pages))
    if not usable:
        raise ValueError(f"no PDF that can be used. {str(refusals) or 'No file there ends in .pdf'}")
    return usable, copies
