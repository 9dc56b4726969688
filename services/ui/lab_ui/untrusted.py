"""Makes untrusted text, of models and of the proxy, safe to show as Markdown: it loads nothing.

Knows Streamlit's Markdown: images, formulas and directives. Does not know where a text comes from.
"""

from __future__ import annotations

import re

# In this order: code span, escape, image, formula, directive.
_SPECIAL = re.compile(r"(?<!`)(?P<code>(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`))|\\.|!(?=\[)|\$|:(?=[a-z-]+\[)")


def plain(text: str) -> str:
    """Markdown in which `![…](…)`, `$…$` and `:red[…]` are shown literally.

    Code is left unchanged: fences that begin in the first column, and spans within a line. If a parser still finds an
    image, the server's content security policy blocks remote ones.
    """
    shown = ""
    fence = ""
    for line in text.split("\n"):
        mark = re.match(r"`{3,}(?=[^`]*$)|~{3,}", line)
        if fence:
            shown += line + "\n"
            closing = re.fullmatch(r" {0,3}(`{3,}|~{3,})[ \t]*", line)
            if closing and closing[1].startswith(fence):
                fence = ""
        elif mark:
            fence = mark[0]
            shown += line + "\n"
        else:
            # Two spaces keep the line break, as in a poem.
            shown += _SPECIAL.sub(_escaped, line) + ("  \n" if line.strip() else "\n")
    return shown.rstrip()


def quote(text: str) -> str:
    """`plain(text)` as a block quote. Every line has the mark, so that no part of the text ends the quote."""
    return "\n".join(f"> {line}" for line in plain(text).split("\n"))


def span(value: object) -> str:
    """A Markdown code span."""
    return "`" + str(value).replace("`", "'").replace("\n", " ") + "`"


def _escaped(match: re.Match[str]) -> str:
    if match["code"] or match[0].startswith("\\"):
        return match[0]
    return "!\\" if match[0] == "!" else "\\" + match[0]
