"""Where images come from: class folders, a zip of them, or parquet files.

A source lists its images once, in one order on every machine, and reads the bytes of any of them. Each has

    names        one per image, unique, relative to the source
    labels       class ids, in the order of `names`
    class_names  by class id
    left_out     how many files of the source are no images, by extension
    read(index)  the bytes of an encoded image
"""

from __future__ import annotations

import glob
import json
import os
import zipfile
import zlib
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow
from pyarrow import parquet

from preprocessing.store_writer import count_classes, first_of
from runtime.images import EXTENSIONS, describe_left_out, file_names, is_hidden, is_image, left_out

MAX_FILE_BYTES = 2**30  # of a packed file: more would fill the memory before anything could be said of it


def open_source(location: str | Path) -> Source:
    """A source of any kind: a folder of class folders, a zip of them, or parquet shards (a folder, file or pattern).

    Raises:
        ValueError: nothing there, no class folders, no images, or an archive that cannot be read.
    """
    path = Path(location)
    if not path.exists() and any(character in str(location) for character in "*?["):
        there = next(parent for parent in path.parents if parent.exists())  # no pattern, whatever its name
        files = sorted(glob.glob(str(Path(glob.escape(str(there)), path.relative_to(there))), recursive=True))
        if not files:
            raise ValueError(f"--source: no file matches {location}")
        return ParquetSource([Path(file) for file in files])
    if not path.exists():
        raise ValueError(f"--source: expected a folder, a zip or parquet files, found nothing at {path}")
    if path.is_file():
        return ParquetSource([path]) if path.suffix == ".parquet" else ZipSource(path)
    names = file_names(path)
    shards, image = [path / name for name in names if name.endswith(".parquet")], next(filter(is_image, names), None)
    if image and (packed := next(filter(_holds_images, shards), None)):
        fix = f"give '{packed.parent}/*.parquet', or the directory around the classes"
        raise ValueError(
            f"--source: expected images or parquet files of them, found {packed} and {path / image}; {fix}"
        )
    return FolderSource(path, names) if image or not shards else ParquetSource(shards)


def _by_class(names: list[str], location: Path) -> tuple[list[int], list[str]]:
    """Labels of sorted names, and the classes: the first directory of each name, in sorted order."""
    if not names:
        raise ValueError(f"--source: expected images ({' '.join(sorted(EXTENSIONS))}), found none in {location}")
    loose = [name for name in names if "/" not in name]
    if loose:
        fix = "put each class into a directory of its own (one directory will do for images without classes)"
        raise ValueError(f"--source: expected class directories in {location}, found none around {loose[0]}; {fix}")
    class_names = sorted({name.split("/", 1)[0] for name in names})
    if above := sorted({*class_names} - {name.split("/", 1)[0] for name in names if name.count("/") == 1}):
        found = f"directories alone in {', '.join(above[:4])}"
        fix = f"give {location / above[0]}" if location.is_dir() else "pack the class directories themselves"
        fix += ", or move the images of each class up into its own directory"
        raise ValueError(f"--source: expected images in each class directory of {location}, found {found}; {fix}")
    ids = {class_name: label for label, class_name in enumerate(class_names)}
    return [ids[name.split("/", 1)[0]] for name in names], class_names


def describe(source: Source) -> str:
    """Images by class, and what of the source is left out, in a line."""
    text = f"{len(source.names):,} images: {count_classes(source.labels, source.class_names)}"
    if source.empty:
        text += f"; without images, and not counted as classes: {first_of(source.empty)}"
    return text + (f"; no images, left out: {describe_left_out(source.left_out)}" if source.left_out else "")


class FolderSource:
    """Class directories, each of which may hold directories in turn.

    Args:
        files: its `file_names`.
    """

    def __init__(self, folder: Path, files: list[str]):
        self.folder, self.left_out = folder, left_out(files)
        self.names = [name for name in files if is_image(name)]
        self.labels, self.class_names = _by_class(self.names, folder)
        inside = sorted(path.name for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name))
        self.empty = [name for name in inside if name not in self.class_names]

    def read(self, index: int) -> bytes:
        return (self.folder / self.names[index]).read_bytes()


class ZipSource:
    """A zip of class folders, with or without one folder around them all. Nothing is extracted to disk."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                entries = {PurePosixPath(entry.filename.lstrip("/")): entry for entry in archive.infolist()}
        except (zipfile.BadZipFile, OSError) as error:
            expected = "expected a folder, a zip or parquet files"
            raise ValueError(f"--source: {expected}; {path} is no zip ({error})") from error
        entries = {place: entry for place, entry in entries.items() if not any(map(is_hidden, place.parts))}
        files = [place for place, entry in entries.items() if not entry.is_dir()]
        members, self.left_out = [m for m in files if is_image(m.name)], left_out(map(str, files))
        depth = 0  # folders around all classes
        while all(len(m.parts) > depth + 2 for m in members) and len({m.parts[depth] for m in members}) == 1:
            depth += 1
        members.sort(key=lambda place: place.parts)
        self.names = ["/".join(place.parts[depth:]) for place in members]
        self._entries = [entries[place].filename for place in members]  # "./a//0.png" is a/0.png
        self.labels, self.class_names = _by_class(self.names, path)
        inside = [place for place in entries if place.parts[:depth] == members[0].parts[:depth]]
        deep = [place for place in inside if len(place.parts) > depth + (not entries[place].is_dir())]
        self.empty = sorted({place.parts[depth] for place in deep} - {*self.class_names})
        self._archive: zipfile.ZipFile | None = None

    def read(self, index: int) -> bytes:
        if self._archive is None:
            self._archive = zipfile.ZipFile(self.path)
        member = self._archive.getinfo(self._entries[index])
        if member.file_size > MAX_FILE_BYTES:
            raise OSError(f"{member.file_size:,} bytes when unpacked, no image has more than {MAX_FILE_BYTES:,}")
        try:
            return self._archive.read(member)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:  # a damaged member, of a zip that can be read
            raise OSError(str(error)) from error

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_archive": None}  # an open file is not shared between processes


class ParquetSource:
    """Parquet files as datasets are published on the hub: columns `image` (struct of bytes and path) and `label`."""

    def __init__(self, files: list[Path]):
        _check_one_split(files)
        self.files, self.left_out, self.empty = files, {}, []
        self.names, self.labels, self.class_names = [], [], []
        self._groups: list[tuple[int, int]] = []  # (file, row group), in order
        starts = [0]
        for number, path in enumerate(files):
            file, labels = _open_parquet(path)
            self.labels += labels
            for group in range(file.num_row_groups):
                self._groups.append((number, group))
                starts.append(starts[-1] + file.metadata.row_group(group).num_rows)
            self.names += [f"{path.name}/{row}" for row in range(file.metadata.num_rows)]
            self.class_names = self.class_names or _hub_class_names(file.schema_arrow.metadata or {})
        self._starts = np.array(starts)
        self._cached: tuple[int, pyarrow.Array | None] = (-1, None)
        if not self.names:
            raise ValueError(f"--source: expected rows in {files[0]} and its like, found none")
        if any(not isinstance(label, int) or label < 0 for label in self.labels):
            raise ValueError(f"--source: expected labels of 0 and more in {files[0].parent}, found others")
        count = max(self.labels) + 1
        if self.class_names and len(self.class_names) < count:
            raise ValueError(f"--source: expected labels below {len(self.class_names)}, found {count - 1}")
        self.class_names = self.class_names or [str(label) for label in range(count)]

    def read(self, index: int) -> bytes:
        place = int(np.searchsorted(self._starts, index, side="right")) - 1
        if self._cached[0] != place:  # neighbours are asked for in turn: a group is read once
            number, group = self._groups[place]
            table = _parquet_file(self.files[number]).read_row_group(group, columns=["image"])
            self._cached = (place, table.column("image").combine_chunks())
        content = self._cached[1][index - int(self._starts[place])].as_py()
        if not content or content["bytes"] is None:
            raise OSError("the row holds no image bytes")
        return content["bytes"]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_cached": (-1, None)}


def _check_one_split(files: list[Path]) -> None:
    folders = sorted({str(file.parent) for file in files})
    if len(folders) > 1:
        found = f"{len(folders)}, which may be splits: {folders[0]}, {folders[1]}; give one of them"
        raise ValueError(f"--source: expected parquet files of one folder, found those of {found}")
    splits = sorted({file.name.split("-")[0] for file in files if "-of-" in file.name})
    if len(splits) > 1:
        found = f"{', '.join(splits)}; name one by a pattern, such as '{folders[0]}/{splits[0]}-*.parquet'"
        raise ValueError(f"--source: expected parquet files of one split, found {found}")


def _parquet_file(path: Path) -> parquet.ParquetFile:
    return parquet.ParquetFile(pyarrow.OSFile(os.fsencode(path)))  # as bytes: a name need not be UTF-8


def _holds_images(path: Path) -> bool:
    try:
        return "image" in _parquet_file(path).schema_arrow.names
    except (pyarrow.ArrowException, OSError):
        return False


def _open_parquet(path: Path) -> tuple[parquet.ParquetFile, list]:
    """A file with the columns of a source, and its labels."""
    try:
        file = _parquet_file(path)
        image = file.schema_arrow.field("image").type
        if not (pyarrow.types.is_struct(image) and image.get_field_index("bytes") >= 0):
            raise KeyError("image.bytes")
        return file, file.read(columns=["label"]).column("label").to_pylist()
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        columns = "columns image (struct with bytes) and label"
        raise ValueError(f"--source: expected parquet with {columns}, found {path} ({reason})") from error


def _hub_class_names(metadata: dict[bytes, bytes]) -> list[str]:
    """Class names from the features that the hub's datasets store in a parquet schema, if they are there."""
    try:
        return list(json.loads(metadata[b"huggingface"])["info"]["features"]["label"]["names"])
    except (KeyError, TypeError, ValueError):
        return []


Source = FolderSource | ZipSource | ParquetSource
