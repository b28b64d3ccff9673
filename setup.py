"""Installs the package `paddle_clip` and nothing else, as pyproject.toml says."""

from setuptools import setup

setup()
