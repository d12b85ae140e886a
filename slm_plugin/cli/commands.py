"""The application with all its commands."""

from slm_plugin.cli import computing, telling
from slm_plugin.cli.app import app

__all__ = ["app", "computing", "telling"]
