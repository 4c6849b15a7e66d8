"""How Sphinx builds the site: ``make docs``. Neither building nor viewing needs a network."""

import sys
from pathlib import Path

import ensemble_rm

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "ensemble_rm"
author = "The ensemble-rm authors"
project_copyright = "The ensemble-rm authors"
version = release = ensemble_rm.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "numpydoc",
    "myst_parser",
    "public_names",
]
exclude_patterns = ["_build", "_extensions", "deployment/*", "reference/generated/*.txt"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

# Signatures without types: numpydoc's sections state them, with shapes and units.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autosummary_generate = False  # the pages of public_names hold the entries themselves
numpydoc_show_class_members = False

# A name in single backticks is a link wherever the reference has it; public_names resolves it.
default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [("py:obj", ".*")]

html_theme = "pydata_sphinx_theme"
html_title = "ensemble_rm"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "show_prev_next": False,
    "navbar_align": "left",
    "header_links_before_dropdown": 8,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}
html_sidebars = {"index": [], "get_started": [], "changelog": []}
