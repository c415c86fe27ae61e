"""The documentation site: Sphinx with the furo theme, pages in Markdown, the reference from docstrings.

``make docs`` treats every warning as an error: a link to a page, a heading or a file that is not there fails the build.
"""

from __future__ import annotations

import omnisparse_flex

project = "omnisparse_flex"
author = "the omnisparse_flex authors"
release = version = omnisparse_flex.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "conf.py"]
html_theme = "furo"
html_title = f"omnisparse_flex {release}"
html_copy_source = False

myst_heading_anchors = 3  # so that links to headings are checked
myst_links_external_new_tab = False

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# A dataclass says its fields in its docstring; listing them again as attributes would describe each twice.
napoleon_use_ivar = True
python_maximum_signature_line_length = 90
