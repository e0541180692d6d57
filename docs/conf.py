"""How the pages become a site: `make docs`."""

from perqueue import __version__

project = "perqueue"
author = "The perqueue authors"
copyright = f"2026, {author}"  # noqa: A001 - Sphinx's name
version = release = __version__

extensions = [
    "myst_parser",  # Markdown
    "sphinx.ext.autodoc",
    "sphinx_click",
]
html_theme = "furo"
html_title = f"perqueue {__version__}"
html_copy_source = False
html_show_sphinx = False
exclude_patterns = ["plots"]

default_role = "code"  # single backticks, too
smartquotes = False  # two hyphens are an option
myst_heading_anchors = 4
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_class_signature = "separated"
autodoc_default_options = {
    "members": True,
    "exclude-members": "before_fork, after_fork_in_parent, after_fork_in_child, deliver_at_exit",
}

nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(collections|datetime|httpx|os|ssl|types)\..*|AbstractContextManager|datetime|timedelta"),
    ("py:class", r"(ClientOptions|MeterProvider|ReceiptOffice|StateName|Token|perqueue\._flush\.Default)"),
    ("py:class", r"(Fault|ReceivedActivity|RequestSeen|When)"),
]
