"""Code of a page of the documentation."""

import re
from pathlib import Path

DEPLOY = Path(__file__).parents[2] / "docs" / "deploy.md"


def code(heading, language="python", page=DEPLOY):
    """The one block of a language in the section with that heading."""
    _, _, section = page.read_text(encoding="utf-8").partition(f"\n## {heading}\n")
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", section.partition("\n## ")[0], re.DOTALL | re.MULTILINE)
    return found
