"""Tables with a header, as spreadsheets and programs write them: comma, semicolon, tab or bar between the columns."""

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from diffusionrl.errors import UserError

DELIMITERS = ",;\t|"


def read_utf8(file: Path) -> str:
    """Raises UserError naming the line that is not UTF-8."""
    try:
        content = file.read_bytes()
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file}:{line}: not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error}") from error


def cells_of(line: str, delimiter: str) -> list[str]:
    """Of one line, without blanks around them; none where its quotes do not close."""
    try:
        return [cell.strip() for cell in next(_reader(line, delimiter), [])]
    except csv.Error:
        return []


def columns_of(header: str, wanted: Sequence[str]) -> tuple[str, list[str]]:
    """The delimiter under which a header has most of the columns that are wanted (and most columns at all), and the columns;
    those that are wanted under these names, however they are written."""

    def named(delimiter: str) -> list[str]:
        cells = cells_of(header, delimiter)
        exact = set(cells)
        return [cell.casefold() if cell.casefold() in wanted and cell.casefold() not in exact else cell for cell in cells]

    found = {delimiter: named(delimiter) for delimiter in DELIMITERS}
    best = max(found, key=lambda each: (len(set(wanted) & set(found[each])), len(found[each])))
    return best, found[best]


def rows_of(
    text: str, file: Path, wanted: Sequence[str], needed: Sequence[str] = ()
) -> Iterator[tuple[int, dict[str, str] | UserError]]:
    """Line numbers and rows by column, or what is wrong with a row; blank ones are left out.

    Raises:
        UserError: a column that is needed is missing, one is twice there, or quotes do not close.
    """
    header = next((line for line in text.splitlines() if line.strip()), "")
    delimiter, columns = columns_of(header, wanted)
    for name in needed:
        if name not in columns:
            raise UserError(f'{file} has no column "{name}" in its first line, but {columns}: name the column so')
    twice = [name for name in columns if name and columns.count(name) > 1]
    if twice:
        raise UserError(f"{file} has two columns {twice[0]!r}: rename or remove one")
    rows, begun = _reader(text, delimiter), False
    try:
        for row in rows:
            cells = [cell.strip() for cell in row]
            if not any(cells):
                continue
            if not begun:
                begun = True
            elif len(cells) == len(columns):
                yield rows.line_num, dict(zip(columns, cells, strict=True))
            else:
                yield (
                    rows.line_num,
                    UserError(
                        f"{file}:{rows.line_num}: {len(cells)} columns, and the first line names {len(columns)} ({columns}): a "
                        f"text with {delimiter!r} in it is put into double quotes"
                    ),
                )
    except csv.Error as error:
        raise UserError(
            f"{file}:{rows.line_num}: {error}: are all double quotes closed, and those in a text doubled?"
        ) from error


def _reader(text: str, delimiter: str) -> Any:
    return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
