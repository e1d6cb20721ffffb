# SPDX-License-Identifier: Apache-2.0
"""The documents as text: their sections, commands, links and headings."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (*(ROOT / name for name in NAMES), *sorted((ROOT / "docs").glob("*.md")))
}


def section(text, title):
    """What stands below the heading of second level `title`."""
    return re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)[1]


def commands(text, starts):
    """The shell commands in fenced blocks that start so, comments cut off, continued lines joined."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    lines = "\n".join(block for language, block in blocks if not language).replace("\\\n", " ").splitlines()
    return [re.sub(r"\s+#.*", "", line).strip() for line in lines if line.startswith(starts)]


def links(text):
    """The targets of links and images in a document."""
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))


def anchors(text):
    """What #... may point to: the headings, as GitHub turns them into anchors."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
