"""README.md and docs/*.md as data: their blocks of code, the outputs they show, and the edits they describe.

What a fenced block is follows from what a reader sees:

    ```python                       code that runs, one namespace for a document, in order
    ``` right after such a block    what it prints
    ```cython                       a quotation of the source file linked last before it; "..." lines leave lines out
    `path`, <place>:  before it     in docs/add_an_op.md: text to put into that file; a place is "a new file", "at the
                                    end", "after `...`" or "before `...`" the one line that begins so

Called by test_docs.py and parity/test_docs_torch.py; calls nothing of pyllmc.
"""

import contextlib
import io
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

LINK = re.compile(r"\]\(([^()\s]+)\)")
EDIT = re.compile(
    r"^`(?P<path>[\w./]+)`, (?:(?P<new>a new file)|(?P<end>at the end)|(?P<side>after|before) `(?P<anchor>[^`]+)`):$"
)
# Errors are shown as 3e-07: their size is promised, their digits are the machine's.
SIZE = re.compile(r"\b\d(?:\.\d)?e[-+]\d\d\b")


@dataclass
class Block:
    """A fenced block: its language ("" for none), its text, and where it stands."""

    document: Path
    line: int
    language: str
    text: str
    intro: str  # the last line of text before it
    link: str | None  # the last link before it
    output: str | None = None  # the block that shows what it prints

    def __str__(self):
        return f"{self.document.relative_to(ROOT)}:{self.line}"

    @property
    def needs_torch(self):
        return re.search(r"\btorch\b", self.text) is not None

    @property
    def edit(self):
        """The match of EDIT where this is text to put into a file."""
        return EDIT.match(self.intro)


def blocks(document):
    """The fenced blocks of a document, in order."""
    found, opened, body, intro, link = [], None, [], "", None
    for number, line in enumerate(document.read_text(encoding="utf-8").splitlines(), 1):
        if opened is None and line.startswith("```"):
            opened, body = (number, line[3:].strip()), []
        elif opened is None:
            intro = line if line.strip() else intro
            link = (LINK.findall(line) or [link])[-1]
        elif line == "```":
            start, language = opened
            block = Block(document, start, language, "\n".join(body) + "\n", intro, link)
            if language == "" and found and found[-1].language == "python" and intro == "":
                found[-1].output = block.text
            found.append(block)
            opened, intro = None, ""
        else:
            body.append(line)
    assert opened is None, f"{document}: the block that opens on line {opened[0]} does not close"
    return found


def python_blocks(document):
    """Code to run: not the edits."""
    return [block for block in blocks(document) if block.language == "python" and not block.edit]


def printed():
    """A context in which what is printed is collected."""
    return contextlib.redirect_stdout(io.StringIO())


def run(code):
    """Runs blocks in one namespace, which it returns; each must print what the document shows."""
    namespace = {"__name__": "__main__"}
    for block in code:
        source = "\n" * block.line + block.text  # so that a traceback shows the document's line
        with printed() as output:
            exec(compile(source, str(block.document), "exec"), namespace)  # noqa: S102
        if block.output is not None:
            assert_same_output(str(block), output.getvalue(), block.output)
    return namespace


def assert_same_output(label, printed, shown):
    """The same text; where it has the size of an error, the same within a factor of ten."""
    assert SIZE.sub("#", printed) == SIZE.sub("#", shown), f"{label} prints\n{printed}but shows\n{shown}"
    for a, b in zip(SIZE.findall(printed), SIZE.findall(shown), strict=True):
        assert 0.1 <= float(a) / float(b) <= 10.0, f"{label} prints {a} but shows {b}"


def apply(edits, tree):
    """Makes the edits of a document in a copy of the repository."""
    for block in edits:
        where = block.edit
        path = tree / where["path"]
        if where["new"]:
            assert not path.exists(), f"{block}: {path} is there already"
            path.write_text(block.text, encoding="utf-8")
            continue
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        at = len(lines)
        if where["anchor"]:
            fitting = [i for i, line in enumerate(lines) if line.lstrip().startswith(where["anchor"])]
            assert len(fitting) == 1, f"{block}: {len(fitting)} lines of {where['path']} begin with {where['anchor']}"
            at = fitting[0] + (where["side"] == "after")
        blank = []
        if where["side"] == "before":  # stands apart from what follows as that does from what precedes it
            while not lines[at - len(blank) - 1].strip():
                blank.append("\n")
        path.write_text("".join([*lines[:at], block.text, *blank, *lines[at:]]), encoding="utf-8")


# ---- quotations, links, commands -------------------------------------------------------------------------------------


def quotations(document):
    """(block, file) of each piece of source that a document quotes."""
    quoting = [block for block in blocks(document) if block.language == "cython" and not block.edit]
    return [(block, document.parent / block.link) for block in quoting]


def missing_lines(quotation, source):
    """The first stretch of a quotation that does not follow in the source, or None; "..." stands between stretches."""
    rest = "\n" + source
    for stretch in quotation.split("\n...\n"):
        wanted = "\n" + stretch.rstrip("\n") + "\n"
        at = rest.find(wanted)
        if at < 0:
            return stretch
        rest = rest[at + len(wanted) - 1 :]
    return None


def without_blocks(text):
    """The text of a document outside its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def commands(document):
    """Every command line that a document shows: in fenced or indented blocks, or between backticks."""
    text = document.read_text(encoding="utf-8")
    prose = without_blocks(text)
    lines = [line for block in blocks(document) for line in block.text.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"^    (.*)$", prose, flags=re.MULTILINE)
    lines += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    return lines
