"""Build script; everything static lives in pyproject.toml."""

from setuptools import setup

setup()
