"""Images out of Parquet files, row by row in their order: one row group is read once, a few rows at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import pyarrow as pa
import pyarrow.parquet as pq

from components.data.errors import SourceError
from components.data.images import decode_image, fit_square
from components.data.sources.source import Drawing, Item
from components.runtime.storage.connection import connect, reason, retried
from components.runtime.storage.store import Store

ROWS = 32  # in memory at a time
BUFFER = 4 * 2**20  # bytes of a column that are fetched at a time, so that a large row group needs no more
NO_LABEL = -1  # of rows whose class is missing: quarantined


@dataclass(frozen=True)
class ParquetReader:
    """Reads the image of `item.location`: file, row group, and row in it."""

    path: str
    column: str  # of bytes

    def read(self, item: Item) -> bytes:
        file, group, row = item.location.rsplit(":", 2)
        url = Store(self.path).url(file)
        rows = _open_rows(url, int(group), self.column)
        return retried(lambda: rows.at(int(row)), url)

    def draw(self, item: Item, data: bytes, *, resolution: int) -> Drawing:
        if item.label == NO_LABEL:
            raise ValueError("the row has no class")
        if not data:
            raise ValueError("the row holds no bytes of an image")
        file, group, row = item.location.rsplit(":", 2)
        details: dict[str, object] = {"file": file, "row_group": int(group), "row": int(row)}
        return Drawing(fit_square(decode_image(data), resolution), details=details)


class RowGroup:
    """The cells of one column in one row group; rows are asked for in their order, or it is opened again."""

    def __init__(self, url: str, group: int, column: str) -> None:
        self.url, self.group, self.column = url, group, column
        self.cells: Iterator[bytes] = iter(())
        self.next = -1  # the row that comes next; -1: not open

    def at(self, row: int) -> bytes:
        """The bytes of a row, none of an empty one. Raises SourceError if the file is damaged there."""
        if not 0 <= self.next <= row:
            self.cells, self.next = self._open(), 0
        try:
            while self.next < row:
                next(self.cells)
                self.next += 1
            cell = next(self.cells)
        except BaseException as error:
            self.next = -1
            if not is_damage(error):
                raise
            raise SourceError(
                f"{self.url}, row group {self.group}: can't be read ({reason(error)}); copy the file again"
            ) from error
        self.next += 1
        return cell

    def _open(self) -> Iterator[bytes]:
        file = open_parquet(self.url, buffer_size=BUFFER)
        for batch in file.iter_batches(batch_size=ROWS, row_groups=[self.group], columns=[self.column]):
            column = batch.column(0)
            for cell in column.field("bytes") if pa.types.is_struct(column.type) else column:
                yield cell.as_py() or b""


def open_parquet(url: str, *, buffer_size: int = 0) -> pq.ParquetFile:
    """The file at `url` with its footer read. Raises SourceError if it is none, FileNotFoundError if it is missing."""
    filesystem, path = connect(url)
    try:
        return pq.ParquetFile(filesystem.open(path, "rb", cache_type="none"), buffer_size=buffer_size)
    except Exception as error:
        if not is_damage(error):
            raise
        raise SourceError(f"{url} can't be read as Parquet ({reason(error)}); copy it again") from error


def is_damage(error: BaseException) -> bool:
    """Whether it is Parquet's own word about a damaged file, not that of the network or the disk."""
    return isinstance(error, pa.ArrowException) or (type(error) is OSError and error.errno is None)


@lru_cache(maxsize=1)
def _open_rows(url: str, group: int, column: str) -> RowGroup:
    return RowGroup(url, group, column)
