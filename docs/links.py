"""A hook of mkdocs: links from a page to a file of the checkout are checked, and shown as code on the site.

Pages are read on the site and in a checkout, where links such as ../experiments/README.md lead somewhere.
"""

import logging
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[1]
_LOG = logging.getLogger("mkdocs.hooks.links")


def on_page_markdown(markdown, page, **_):
  folder = (ROOT / "docs" / page.file.src_uri).parent

  def checked(match):
    text, target = match.groups()
    path = (folder / target.partition("#")[0]).resolve()
    if path.is_relative_to(ROOT / "docs"):
      return match[0]  # mkdocs checks it
    if not path.exists():
      _LOG.warning("%s links to %s, which is not there", page.file.src_uri, target)
    return text if text.startswith("`") else f"{text} (`{path.relative_to(ROOT)}`)"

  return re.sub(r"\[([^\]]+)\]\((\.\.?/[^)]+)\)", checked, markdown)
