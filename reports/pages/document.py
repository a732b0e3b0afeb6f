"""A report as data: a first page and sections of blocks, which every printer shows in its own way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from reports.criteria import Level
from reports.decide import Judgement
from reports.format import Table
from reports.judging.ranking import State

NamedText = tuple[str, str]
"""Name and text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """Names with texts."""

    items: tuple[NamedText, ...]
    block: Literal["facts"] = "facts"


@dataclass(frozen=True, kw_only=True, slots=True)
class Paragraph:
    text: str
    small: bool = False
    block: Literal["paragraph"] = "paragraph"


@dataclass(frozen=True, kw_only=True, slots=True)
class Bullets:
    items: tuple[str, ...]
    small: bool = False
    block: Literal["bullets"] = "bullets"


@dataclass(frozen=True, kw_only=True, slots=True)
class Ticks:
    """A checklist: ticked or not, what it is about, and its text."""

    items: tuple[tuple[bool, str, str], ...]
    block: Literal["ticks"] = "ticks"


@dataclass(frozen=True, kw_only=True, slots=True)
class Lines:
    """Lines of code or of a file, as they are."""

    text: str
    kind: str = ""
    block: Literal["lines"] = "lines"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sheet:
    """A table with its title. `key` names it in files of data."""

    key: str
    title: str
    table: Table
    block: Literal["sheet"] = "sheet"


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """A chart: its SVG, and what its marks mean."""

    title: str
    svg: str
    caption: str
    block: Literal["drawing"] = "drawing"


Block = Facts | Paragraph | Bullets | Ticks | Lines | Sheet | Drawing


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    key: str
    """Its anchor."""
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """One key figure."""

    label: str
    value: str
    detail: str
    known: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class AskedRow:
    """What was asked for, and what came of it."""

    level: Level | None
    """`None`: each row is another method that is asked the same."""
    id: str
    outcome: Judgement
    note: str
    cells: tuple[str, ...]
    """Name, asked, measured, predicted, outcome."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FrontPage:
    """What fits on one sheet of A4 and decides."""

    state: State
    state_text: str
    sentence: str
    asides: tuple[str, ...]
    """Below the sentence: settings, other methods."""
    command: str
    """The one that would settle what is open; empty: none."""
    tiles: tuple[Tile, ...]
    tiles_title: str
    parts: tuple[tuple[str, tuple[NamedText, ...]], ...]
    """Purpose, conditions, effect, cost: title and facts."""
    risks: tuple[str, ...]
    criteria: tuple[AskedRow, ...]
    decision: tuple[NamedText, ...]
    """Who decides and when. An empty text is a line to write on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    title: str
    made_by: str
    front: FrontPage
    sections: tuple[Section, ...] = field(default=())

    @property
    def sheets(self) -> tuple[Sheet, ...]:
        """Every table, in order."""
        return tuple(
            block for section in self.sections for block in section.blocks if isinstance(block, Sheet)
        )
