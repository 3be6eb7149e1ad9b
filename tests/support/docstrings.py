"""Docstrings and sources that are read once in a process, and not by every command: half the time of a small one."""

import inspect
from functools import cache

import docstring_parser

docstring_parser.parse_from_object = cache(docstring_parser.parse_from_object)
inspect.getsource = cache(inspect.getsource)  # Python 3.11 and 3.12 parse a whole file to find a class in it
