"""Place of the C++ extension modules, which pyproject.toml cannot declare; everything else is said there."""

from setuptools import setup

setup()
