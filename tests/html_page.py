"""A page as a parser sees it, for the tests of the reports."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "img", "br", "line", "polyline", "circle"}


class Page(HTMLParser):
    """Checks that tags nest, and collects tags, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        assert self.open == [], "every tag is closed"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            # A paragraph or item ends with its parent in HTML; the template closes all others itself.
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
