"""What a check found, and how it reads on a terminal."""

import textwrap
from dataclasses import dataclass
from typing import Literal

_INDENT = " " * 19


@dataclass(frozen=True)
class Finding:
    """One check: its verdict, what was seen, and what to do about it where that is not all well."""

    verdict: Literal["pass", "warn", "fail"]
    check: str
    said: str
    remedy: str = ""

    def layout(self, width: int) -> str:
        """Lines of at most ``width`` characters: verdict, check and reason in columns, the remedy below."""
        lines = textwrap.wrap(f"{self.verdict}  {self.check:<13}{self.said}", width, subsequent_indent=_INDENT)
        if self.remedy:
            lines += textwrap.wrap(self.remedy, width, initial_indent=f"{_INDENT}→ ", subsequent_indent=f"{_INDENT}  ")
        return "\n".join(lines)
