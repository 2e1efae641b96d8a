"""Limits of what a zip archive may hold, from its directory alone, before anything of it is read."""

from __future__ import annotations

import zipfile
from pathlib import Path

from cbs_opt.errors import CbsError

_EXPANSION = 100  # times its size in the file that a compressed archive may take in memory, if that is more than
_SMALL = 1 << 28  # bytes


def check_archive(archive: zipfile.ZipFile, path: Path, error: type[CbsError], most_members: int) -> None:
    """Refuse an archive that would take far more memory than the file is long.

    Parameters
    ----------
    archive : zipfile.ZipFile
    path : Path
        Named in the message.
    error : type
        The error class to raise.
    most_members : int

    Raises
    ------
    CbsError
        The given class: for too many members, methods of compression other than deflate, members that expand to
        more than 256 MB and more than 100 times their size, or sizes that the file cannot have.
    """
    members = archive.infolist()
    if len(members) > most_members:
        raise error(f"{path}: holds {len(members)} members; at most {most_members} are expected")
    packed = [info for info in members if info.compress_type != zipfile.ZIP_STORED]
    for info in packed:
        if info.compress_type != zipfile.ZIP_DEFLATED:
            raise error(
                f"{path}: {info.filename[:60]!r} is compressed by method {info.compress_type}; members must be "
                "stored as they are or deflated, as `numpy.savez` and `numpy.savez_compressed` write them"
            )
    length = path.stat().st_size
    expanded = sum(info.file_size for info in packed)
    if expanded > max(_SMALL, _EXPANSION * min(length, sum(info.compress_size for info in packed))):
        raise error(
            f"{path}: its compressed members would expand to {expanded / 1e9:.1f} GB, more than {_EXPANSION} "
            "times their size in the file: write it without compression if that is right"
        )
    announced = sum(info.compress_size for info in members)
    if announced > length:
        raise error(f"{path}: is damaged: it announces {announced} bytes of data and has {length} bytes")
    for info in members:
        if info.compress_type == zipfile.ZIP_STORED and info.compress_size != info.file_size:
            raise error(
                f"{path}: is damaged: {info.filename[:60]!r} is stored in another number of bytes than it holds"
            )
