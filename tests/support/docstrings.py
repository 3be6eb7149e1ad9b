"""Docstrings that are parsed once in a process, and not by every command: half of the time of a small command."""

from functools import cache

import docstring_parser

docstring_parser.parse_from_object = cache(docstring_parser.parse_from_object)
