"""Reads a page as a browser would, as far as tests care."""

from html import parser
import re

_LOADING = ("src", "href", "srcset", "data", "action")
_LOADING_TAGS = {"script", "link", "iframe", "img", "object", "base"}


class PageReader(parser.HTMLParser):
  """Collects tags with their attributes, and the text."""

  def __init__(self, page):
    super().__init__()
    self.page, self.tags, self.text = page, [], []
    self.feed(page)

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_data(self, data):
    self.text.append(data)

  def words(self):
    return " ".join(" ".join(self.text).split())

  def count(self, tag):
    return [name for name, _ in self.tags].count(tag)

  def loads(self):
    """What the page would fetch from elsewhere."""
    found = [tag for tag, _ in self.tags if tag in _LOADING_TAGS]
    for _, attributes in self.tags:
      found += [
        attributes[name]
        for name in _LOADING
        if attributes.get(name, "").startswith(("http", "//"))
      ]
    return found + re.findall(r"url\((?!#)|@import", self.page)
