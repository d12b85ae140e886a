"""The application with all its commands."""

from slm_plugin.cli import reading, writing
from slm_plugin.cli.app import app

__all__ = ["app", "reading", "writing"]
